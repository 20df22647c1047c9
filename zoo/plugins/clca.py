"""CLCA: the cache CLC and the head CLA together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from reduction.schedules.base import Schedule
from reduction.tokens import Tokens
from zoo.plugins.base import Plugin, register_plugin
from zoo.plugins.cla import CLA
from zoo.plugins.clc import CLC
from zoo.plugins.stages import CLCA_CARD


@register_plugin("clca")
class CLCA(Plugin):
    """Cross-Layer Cache Aggregation around any reducer, or none.

    The cache gives back what reductions lose; the head classifies from the class token of several
    layers. The defaults are the paper's.

    Args:
        gap: Cache the mean of the local tokens.
        num_clr: Learned tokens (CLR) that are added to the sequence and cached.
        recover_at_last: Also recover after the last block but one.
        pool_cls: The average includes the class token.
        pool_clr: Before the first recovery the average includes the CLR.
        multiplier: Features per channel after the head's depth-wise convolution; 0 is the older
            IFA head.
        protected: Keep what was appended out of every reduction (ours).
        blocks: Reduction blocks, from 0. None: those of the schedule, see `stage_blocks`.

    Raises:
        ZooError: If an argument is out of range, or (when attached) the blocks are not possible or
            the model has no class token.

    References:
        Rios et al., "Cross-Layer Cache Aggregation for Token Reduction in Ultra-Fine-Grained Image
        Recognition", ICASSP 2025, arXiv 2501.00243; official code github.com/arkel23/CLCA (MIT).
    """

    card = CLCA_CARD
    page = "clca"
    replaces_head: ClassVar[bool] = True

    def __init__(
        self,
        gap: bool = True,
        num_clr: int = 1,
        recover_at_last: bool = True,
        pool_cls: bool = False,
        pool_clr: bool = False,
        multiplier: int = 2,
        protected: bool = False,
        blocks: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.clc = CLC(
            gap,
            num_clr,
            recover_at_last,
            pool_cls,
            pool_clr,
            protected=protected,
            blocks=blocks,
        )
        self.cla = CLA(multiplier, blocks)
        # Messages should name what the user chose.
        for part in (self.clc, self.cla):
            part.__dict__["name"] = self.name
        self.gap = gap
        self.num_clr = num_clr
        self.recover_at_last = recover_at_last
        self.pool_cls = pool_cls
        self.pool_clr = pool_clr
        self.multiplier = multiplier
        self.protected = protected
        self.blocks = self.clc.blocks

    def setup(self, backbone: Any, schedule: Schedule | None = None) -> None:
        """Set up both parts with the same reduction blocks."""
        self.cla.setup(backbone, schedule)
        self.clc.setup(backbone, schedule)
        self.blocks = self.clc.blocks

    def warm_start(self, backbone: Any) -> None:
        """Start the CLR as a copy of the class token."""
        self.clc.warm_start(backbone)

    def reset_classifier(self, num_classes: int) -> None:
        """Start the head over with another number of classes."""
        self.cla.reset_classifier(num_classes)

    def start(self, t: Tokens) -> tuple[Tokens, Any]:
        """Put the CLR at the end of the sequence."""
        t, memory = self.clc.start(t)
        return t, (memory, ())

    def after(self, block: int, t: Tokens, memory: Any) -> tuple[Tokens, Any]:
        """Recover, cache, and keep the class token. A recovery does not touch the latter."""
        t, cached = self.clc.after(block, t, memory[0])
        t, kept = self.cla.after(block, t, memory[1])
        return t, (cached, kept)

    def head(self, backbone: Any, t: Tokens, memory: Any) -> Tensor:
        """Classify from the kept class tokens."""
        return self.cla.head(backbone, t, memory[1])

    def added(self, block: int, depth: int) -> int:
        """Tokens that the cache adds."""
        return self.clc.added(block, depth)

    def spared(self, block: int, depth: int) -> int:
        """Trailing tokens that the reduction of a block leaves alone."""
        return self.clc.spared(block, depth)

    def macs(self, backbone: Any) -> int:
        """Multiply-accumulates of the head; the cache has no products of its own."""
        return self.cla.macs(backbone)

    def unused(self, backbone: Any) -> set[str]:
        """The backbone's final norm and classifier."""
        return self.cla.unused(backbone)

    def no_weight_decay(self) -> set[str]:
        """The CLR and its position."""
        return {f"clc.{name}" for name in self.clc.no_weight_decay()}
