"""How many tokens each block keeps, apart from which ones.

A schedule answers one question with plain integers: given block, depth, the tokens entering and
the tokens at the start, what is the budget? So any method runs under any schedule, and the cost
of a run is known before it starts. Counts are of reducible tokens: prefix tokens are never in
them unless a schedule says so.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from reduction.checks import count
from reduction.config import Configured
from reduction.counts import Budget
from reduction.errors import ZooError
from reduction.options import Option, WithOptions

#: Every named schedule; `reduction.registry` looks names up here.
SCHEDULES: dict[str, type[Schedule]] = {}


Align = int | Literal["auto"]


class Schedule(Configured, metaclass=WithOptions):
    """Base of all schedules. Subclasses set `name` and write `budget`.

    Every schedule also takes `align`: lengths of the sequence behind a reduction, prefix tokens
    included, are rounded to the nearest multiple of it, and a block whose rounded length stays does
    nothing. Matrix products and attention kernels of CPUs like such lengths, in bfloat16 above all.
    1 is the paper's counts; "auto" is measured when a model is built.

    Attributes:
        name: Registry name.
        align: What lengths are multiples of.
        dtype: Type of the weights that a clock is to measure with, where the model is cast later.
        strict: Refuse at construction of the model what the method cannot remove. With False
            the request is clipped to what it can, as the official ToMe does.
    """

    name: ClassVar[str] = ""
    strict: bool = True
    align: Align = 1
    dtype: Any = None

    @classmethod
    def common_options(cls) -> Mapping[str, Option]:
        """`align`."""
        return {"align": Option(1, Align, "int | str")}

    def choose(self, align: Align = 1) -> None:
        """Set the options that every schedule has.

        Raises:
            ZooError: If `align` is neither a whole number from 1 nor "auto".
        """
        if align != "auto" and (isinstance(align, str) or count("align", align, 1) > 4096):
            raise ZooError(f"align must be a whole number up to 4096 or 'auto', got {align!r}")
        self.align = align

    def arguments(self) -> dict[str, Any]:
        """Constructor arguments, and `align` where it is not 1."""
        return super().arguments() | ({} if self.align == 1 else {"align": self.align})

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
