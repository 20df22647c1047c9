"""How many tokens each block keeps, apart from which ones.

A schedule answers one question with plain integers: given block, depth, the tokens entering and
the tokens at the start, what is the budget? So any method runs under any schedule, and the cost
of a run is known before it starts. Counts are of reducible tokens: prefix tokens are never in
them unless a schedule says so.
"""

from __future__ import annotations

import json
from typing import Any, ClassVar

from reduction.config import Configured
from reduction.counts import Budget

#: Every named schedule; `reduction.registry` looks names up here.
SCHEDULES: dict[str, type[Schedule]] = {}


class Schedule(Configured):
    """Base of all schedules. Subclasses set `name` and write `budget`.

    Attributes:
        name: Registry name.
        strict: Refuse at construction of the model what the method cannot remove. With False
            the request is clipped to what it can, as the official ToMe does.
    """

    name: ClassVar[str] = ""
    strict: bool = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.name:
            SCHEDULES[cls.name] = cls

    def budget(self, block: int, depth: int, n: int, n0: int) -> Budget | None:
        """Budget of one block.

        Args:
            block: Index of the block, from 0.
            depth: Number of blocks.
            n: Reducible tokens entering the block.
            n0: Reducible tokens at the start.

        Returns:
            The budget, or None where nothing happens.
        """
        raise NotImplementedError

    def refuses(self, block: int, depth: int, n: int, n0: int, limit: int) -> bool:
        """Whether asking for more than `limit` removals here is an error, not a matter of clipping.

        One token too many is rounding: half of 49 cannot be kept by a method that merges pairs.
        """
        budget = self.budget(block, depth, n, n0)
        return budget is not None and n - budget.keep > limit + 1

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Schedule) and self.config() == other.config()

    def __hash__(self) -> int:
        return hash(json.dumps(self.config(), sort_keys=True))
