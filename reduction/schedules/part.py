"""A part of what another schedule removes."""

from __future__ import annotations

from reduction.counts import Budget
from reduction.schedules.base import Schedule


class Part(Schedule):
    """A share of what another schedule removes, in the same blocks.

    Args:
        other: That schedule.
        share: In [0, 1].
    """

    def __init__(self, other: Schedule, share: float) -> None:
        self.other = other
        self.share = share
        self.strict = False

    def budget(self, block: int, depth: int, n: int, n0: int) -> Budget | None:
        budget = self.other.budget(block, depth, n, n0)
        if budget is None:
            return None
        drop = int(self.share * max(0, n - budget.keep))
        return Budget(n - drop) if drop else None
