"""Counts of a plan rounded to lengths that kernels like."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from reduction.base import Reducer
from reduction.counts import Budget, Step
from zoo.errors import UnreachableBudget, ZooError


class Aligned:
    """Turns the reductions of a plan into ones that leave multiples of some length.

    What a schedule asks for is walked through as it is, and every length that it would leave is
    rounded to the nearest multiple, so errors do not add up. A block whose rounded length is no
    shorter than what it has does nothing, and so does one whose method cannot reach a multiple.

    Args:
        align: What lengths are multiples of.
        nominal: The plan as asked for, a `Plan` for each block.

    Raises:
        ZooError: If `align` was never measured.
        UnreachableBudget: If the method does not leave what it is asked for.
    """

    def __init__(self, align: int | str, nominal: Sequence[Any]) -> None:
        if isinstance(align, str):
            raise ZooError(
                "align='auto' is measured by zoo.wrap and zoo.create_model; give a number here"
            )
        self.align, self.nominal = align, nominal
        self._gone = self._pruned = 0  # asked for since the last block that did something

    def entry(self, reducer: Reducer, n: int, fixed: int) -> Step | None:
        """The reduction before the first block.

        Args:
            reducer: The method.
            n: Tokens that it may remove from.
            fixed: Other tokens of the sequence.
        """
        asked = self.nominal[0].entry
        return asked and self._fit(reducer, asked, n, fixed, fixed + reducer.count(n, asked))

    def step(self, reducer: Reducer, block: int, n: int, fixed: int) -> Step | None:
        """The reduction of a block.

        Args:
            reducer: The method.
            block: Index of the block.
            n: Tokens that it may remove from.
            fixed: Other tokens of the sequence.
        """
        plan = self.nominal[block]
        asked: Step | None = plan.step
        if asked is None:
            return None
        entering = plan.entering - fixed
        length = fixed + reducer.count(entering, asked)
        if asked.budget.prune is not None:
            self._pruned += max(entering - asked.budget.prune, 0)
        self._gone += max(entering - asked.keep, 0)
        found = self._fit(reducer, asked, n, fixed, length)
        if found is not None:
            self._gone = self._pruned = 0
        elif reducer.every_block:
            return asked._replace(budget=Budget(n))
        return found

    def _fit(self, reducer: Reducer, asked: Step, n: int, fixed: int, length: int) -> Step | None:
        align = self.align
        assert isinstance(align, int)
        nearest = (2 * length + align) // (2 * align) * align  # halves upwards
        least, others = fixed // align * align + align, False
        for wanted in range(max(nearest, least), fixed + n, align):
            # Some methods leave a token or two more than they keep.
            for more in range(3):
                keep = wanted - fixed - more
                if keep < 1 or n - keep > reducer.max_drop(n):
                    continue
                step = asked._replace(budget=Budget(keep, self._prune(asked, n, keep)))
                if reducer.count(n, step) + fixed == wanted:
                    return step
                others = True
        if others:
            raise UnreachableBudget(
                f"align={align} cannot be met: this method leaves as many tokens as its pattern or "
                "threshold gives and not what it is asked for; use align=1"
            )
        return None

    def _prune(self, asked: Step, n: int, keep: int) -> int | None:
        """Survivors of pruning: as large a share of what leaves as was asked for."""
        if asked.budget.prune is None:
            return None
        share = self._pruned / self._gone if self._gone else 0.0
        return n - round((n - keep) * share)
