"""FlowCut: prune by how information flows to the class token, block after block."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from reduction.assignment import Keep, apply
from reduction.base import Card, Reducer
from reduction.checks import boolean, count
from reduction.counts import Dims, Step
from reduction.functional import thresholds
from reduction.functional.portable import stable_order
from reduction.mixins.adaptive import Adaptive
from reduction.registry import register
from reduction.tokens import Signals, Tokens, take_rows

_SCORE = "flowcut"


class Flow(NamedTuple):
    """What a block says about its patches, `(B, N)` each, without gradient.

    Attributes:
        attention: What the class token pays, mean over heads.
        semantic: Likeness of the values, as a softmax over all tokens, mean over heads.
        strength: Length of the mean value over heads, in the sum of magnitudes.
    """

    attention: Tensor
    semantic: Tensor
    strength: Tensor

    def score(self) -> Tensor:
        """The product that tokens are ranked by."""
        shares = [x / x.sum(1, keepdim=True) for x in (self.attention, self.semantic)]
        return (shares[0] + shares[1]) * self.strength


@torch.no_grad()
def flow(row: Tensor, v: Tensor, prefix: int, mask: Tensor | None = None) -> Flow:
    """Measure a block.

    Args:
        row: What the class token pays, `(B, H, P+N)`.
        v: Values `(B, H, P+N, d)`.
        prefix: P.
        mask: False marks padding, `(B, P+N)`.
    """
    v = v.to(torch.promote_types(v.dtype, torch.float32))
    like = (v[:, :, :1] @ v.transpose(-2, -1)).squeeze(2)
    if mask is not None:
        like = like.masked_fill(~mask.unsqueeze(1), -torch.inf)
    semantic = like.softmax(-1).mean(1)[:, prefix:]
    attention = row.to(v.dtype).mean(1)[:, prefix:]
    return Flow(attention, semantic, v.mean(1).abs().sum(-1)[:, prefix:])


@register("flowcut")
class FlowCut(Adaptive, Reducer):
    """Prune a little in every second block, more where attention is focused.

    Patches are ranked by `(a + s) |v|`: the shares of the class token's attention and of the
    likeness of values to its own, times the strength of the value. Scores of all blocks so far
    count, an earlier one half as much as the next. Behind a block, the lowest leave.

    With a `target`, FlowCut's own rule says how many: counting back from the third last block,
    where exactly the target stays, every second block drops a part of what is too much, larger
    where the entropy of the attention is small. Counts then depend on the image, and a schedule has
    no say. Without one, the schedule says how many (ours).

    Args:
        target: Patches that stay in the end; None follows the schedule.
        compat_batch: Drop as many in every image as in the one of the batch that drops most, as the
            official code.

    Raises:
        ZooError: If the target is below 1.

    References:
        Tong et al., NeurIPS 2025, arXiv 2505.19536; official code github.com/TungChintao/FlowCut
        (Apache-2.0).
    """

    card = Card(
        title="FlowCut: Rethinking Redundancy via Information Flow for Efficient Vision-Language "
        "Models",
        authors="Tong et al.",
        venue="NeurIPS",
        year=2025,
        arxiv="2505.19536",
        code="https://github.com/TungChintao/FlowCut",
        licence="Apache-2.0",
        kind="prune",
        training="none",
        note="With a target, counts depend on the image and only the last one is fixed.",
    )
    site = "post"
    needs = frozenset({"cls_row", "v"})
    every_block = True
    added_tokens = "refuse"
    by_token = frozenset({_SCORE})

    def __init__(self, target: int | None = None, compat_batch: bool = False) -> None:
        super().__init__()
        self.target = count("target", target, null=True)
        self.limited = target is None
        self.compat_batch = boolean("compat_batch", compat_batch)

    def together(self) -> bool:
        return self.compat_batch

    def acts(self, block: int, depth: int) -> bool:
        return self.target is None or block <= depth - 3

    def count(self, n: int, step: Step) -> int:
        if self.target is None:
            return min(n, step.keep)
        return min(n, self.target) if self._left(step) == 0 else n

    def max_drop(self, n: int) -> int:
        return n - 1

    @staticmethod
    def _left(step: Step) -> int:
        """Blocks until the one behind which the target stays."""
        return step.depth - 3 - step.block

    def reduce(self, t: Tokens, s: Signals, step: Step) -> Tokens:
        with torch.no_grad():
            seen = flow(s.need("cls_row"), s.need("v"), t.prefix, t.mask)
            score, old = seen.score(), t.memory.get(_SCORE)
            score = score if old is None else 0.5 * old + 0.5 * score
            chosen = self._choose(score, seen.attention, t, step)
        if chosen is None:
            return t._replace(memory={**t.memory, _SCORE: score})
        out = apply(t, chosen)
        return out._replace(memory={**out.memory, _SCORE: take_rows(score, chosen.index)})

    def _choose(self, score: Tensor, attention: Tensor, t: Tokens, step: Step) -> Keep | None:
        live = torch.ones_like(score, dtype=torch.bool)
        if t.mask is not None:
            live = t.mask[:, t.prefix :]
        wanted = self._wanted(attention, live, step)
        if wanted is None:
            return None
        rank = stable_order(stable_order(score.masked_fill(~live, -torch.inf), descending=True))
        kept = live & (rank < wanted.unsqueeze(1))
        index = torch.arange(t.n, device=score.device).expand_as(rank)
        lengths = thresholds.lengths(kept, self.count(t.n, step))
        chosen = thresholds.packed(index, kept, None, None, *lengths)
        assert isinstance(chosen, Keep)
        return chosen

    def _wanted(self, attention: Tensor, live: Tensor, step: Step) -> Tensor | None:
        """Tokens that every image keeps, `(B,)`; None: all."""
        n = live.sum(1)
        if self.target is None:
            return None if step.keep >= live.shape[1] else n.clamp_max(step.keep)
        left = self._left(step)
        if left % 2 or left < 0:
            return None
        goal = n.clamp_max(self.target)
        if left == 0:
            return goal
        share = attention / attention.sum(1, keepdim=True)
        entropy = -torch.special.xlogy(share, share).sum(1) / n.clamp_min(2).log()
        drop = ((n - goal) / math.sqrt(left) * (1 - entropy.square())).round().long()
        if self.compat_batch:
            drop = drop.amax().expand_as(drop)
        return torch.maximum(n - drop, goal)

    def macs(self, n: int, prefix: int, step: Step, dims: Dims) -> int:
        return (n + prefix) * dims.heads * dims.head_dim
