"""CLC: a cache of summary tokens that are given back after each reduction.

Shapes: B batch, C width, n CLR tokens, c carriers per layer (the average, then n CLR slots).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from reduction.functional.carriers import append
from reduction.schedules.base import Schedule
from reduction.tokens import Tokens
from zoo.adapters.tower import class_tokens, tower_of
from zoo.errors import ZooError
from zoo.plugins.base import Plugin, register_plugin
from zoo.plugins.stages import CLCA_CARD, stage_blocks


@register_plugin("clc")
class CLC(Plugin):
    """Cross-Layer Cache: remember every layer in a few tokens, recover them where tokens are lost.

    A learned token (CLR, like a register) is put at the end of the sequence. After every block the
    mean of the local tokens and the last n tokens are cached. After each reduction block, and
    after the last block but one, the cache is appended to the sequence and emptied. What is
    recovered is an ordinary token from then on: the next reduction may drop or merge it, and so may
    the first one the CLR itself.

    In the paper every reduction is followed by a recovery. With schedules that also reduce in
    between, such a reduction leaves what was appended last alone, so that the last n tokens are
    still CLR slots (ours).

    Args:
        gap: Cache the mean of the local tokens.
        num_clr: n. With 0 the average alone is cached.
        recover_at_last: Also recover after the last block but one.
        pool_cls: The average includes the class token. Registers are always in it.
        pool_clr: Before the first recovery the average includes the CLR.
        cache: False leaves the CLR in the sequence and caches nothing: plain registers.
        protected: Keep what was appended out of every reduction (ours).
        blocks: Reduction blocks, from 0. None: those of the schedule, see `stage_blocks`.

    Raises:
        ZooError: If an argument is out of range, nothing is left to cache, or (when attached) the
            blocks are not possible.

    References:
        Rios et al., ICASSP 2025, arXiv 2501.00243; official code github.com/arkel23/CLCA (MIT).
    """

    card = CLCA_CARD
    page = "clca"

    def __init__(
        self,
        gap: bool = True,
        num_clr: int = 1,
        recover_at_last: bool = True,
        pool_cls: bool = False,
        pool_clr: bool = False,
        cache: bool = True,
        protected: bool = False,
        blocks: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if isinstance(num_clr, bool) or not isinstance(num_clr, int) or num_clr < 0:
            raise ZooError(f"num_clr must be a whole number from 0, got {num_clr!r}")
        if cache and not gap and num_clr == 0:
            raise ZooError("nothing to cache: choose gap=true or num_clr=1")
        self.gap = gap
        self.num_clr = num_clr
        self.recover_at_last = recover_at_last
        self.pool_cls = pool_cls
        self.pool_clr = pool_clr
        self.cache = cache
        self.protected = protected
        self.blocks = None if blocks is None else list(blocks)
        self.recovery: tuple[int, ...] = ()
        self.class_tokens = 1
        self.clr_token: nn.Parameter | None = None
        self.clr_pos_embed: nn.Parameter | None = None

    # ------------------------------------------------------------------ building

    def setup(self, backbone: Any, schedule: Schedule | None = None) -> None:
        """Choose the blocks that recover and create the CLR."""
        self.blocks = stage_blocks(self.name, self.blocks, schedule, backbone)
        self.class_tokens = class_tokens(backbone)
        tower = tower_of(backbone)
        last = {len(tower.blocks(backbone)) - 2} if self.recover_at_last else set()
        self.recovery = tuple(sorted({*self.blocks, *last})) if self.cache else ()
        shape = (1, self.num_clr, tower.width(backbone))
        if self.num_clr and (self.clr_token is None or self.clr_token.shape != shape):
            like = next(backbone.parameters())
            self.clr_token = nn.Parameter(like.new_zeros(shape))
            self.clr_pos_embed = None
            if tower.places_prefix(backbone):
                self.clr_pos_embed = nn.Parameter(like.new_zeros(shape))
            self.warm_start(backbone)

    @torch.no_grad()
    def warm_start(self, backbone: Any) -> None:
        """Start the CLR as a copy of the class token, and its position rows near zero."""
        if self.clr_token is None:
            return
        start = tower_of(backbone).class_embedding(backbone)
        if class_tokens(backbone) == 1 and start is not None:
            self.clr_token.copy_(start.expand_as(self.clr_token))
        else:  # ours: there is no class token of this width to copy
            nn.init.normal_(self.clr_token, std=0.02)
        if self.clr_pos_embed is not None:
            nn.init.normal_(self.clr_pos_embed, std=0.02)

    def no_weight_decay(self) -> set[str]:
        """The CLR and its position, as for the class token."""
        return {name for name, _ in self.named_parameters()}

    # ------------------------------------------------------------------ counting

    def added(self, block: int, depth: int) -> int:
        """The CLR at the start; after a recovery block what was cached since the last one."""
        if block == -1:
            return self.num_clr
        if block not in self.recovery:
            return 0
        at = self.recovery.index(block)
        before = self.recovery[at - 1] if at else 0
        return (block - before) * (self.gap + self.num_clr)

    def spared(self, block: int, depth: int) -> int:
        """Trailing tokens that the reduction of a block leaves alone."""
        if self.protected:
            return sum(self.added(b, depth) for b in range(-1, block))
        if not self.recovery or block in self.recovery or block > self.recovery[-1]:
            return 0
        return self._appended_last(block, depth)

    def _appended_last(self, block: int, depth: int) -> int:
        """Tokens that came with the latest recovery up to and including a block."""
        done = [b for b in self.recovery if b <= block]
        return self.added(done[-1], depth) if done else self.num_clr

    # ------------------------------------------------------------------ running

    def start(self, t: Tokens) -> tuple[Tokens, Any]:
        """Put the CLR at the end of the sequence."""
        if self.clr_token is None:
            return t, ()
        clr: Tensor = self.clr_token
        if self.clr_pos_embed is not None:
            clr = clr + self.clr_pos_embed
        return append(t, clr.expand(t.x.shape[0], -1, -1)), ()

    def after(self, block: int, t: Tokens, memory: Any) -> tuple[Tokens, Any]:
        """Recover where it is time, then cache this layer."""
        if not self.recovery or block > self.recovery[-1]:
            return t, memory
        if block in self.recovery:
            t, memory = append(t, torch.cat(memory, dim=1)), ()
        if block < self.recovery[-1]:
            memory = (*memory, self._carriers(block, t))
        return t, memory

    def _carriers(self, block: int, t: Tokens) -> Tensor:
        """What a layer leaves in the cache, `(B, c, C)`: the average, then the last n tokens."""
        parts = []
        if self.gap:
            outside = self._appended_last(block, -1)
            if self.pool_clr and block < self.recovery[0]:
                outside = 0
            first = 0 if self.pool_cls else self.class_tokens
            parts.append(self._average(t, first, max(t.x.shape[1] - outside, first + 1)))
        if self.num_clr:
            parts.append(t.x[:, t.x.shape[1] - self.num_clr :])
        return torch.cat(parts, dim=1)

    def _average(self, t: Tokens, first: int, stop: int) -> Tensor:
        x = t.x[:, first:stop]
        if t.mask is None:
            return x.mean(1, keepdim=True)
        # The official code averages padding too, so that an image depends on its batch.
        mask = t.mask[:, first:stop].unsqueeze(-1)
        return (x * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp_min(1)
