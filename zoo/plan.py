"""Token counts of every block from plain integers, known before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from reduction.base import Budget, Reducer, Step
from reduction.errors import UnreachableBudget
from reduction.schedule import Schedule
from zoo.plugins.base import Plugin


class Plan(NamedTuple):
    """Counts of one block, known without data; all of them include prefix tokens.

    Attributes:
        entering: Tokens entering the block.
        attention: Tokens in its attention.
        mlp: Tokens in its MLP.
        leaving: Tokens leaving it, a plugin's additions included.
        step: The reduction, or None.
        need: Signals that the block's attention computes.
    """

    entering: int
    attention: int
    mlp: int
    leaving: int
    step: Step | None
    need: frozenset[str]


def make_plan(
    reducer: Reducer | None,
    schedule: Schedule | None,
    plugins: Sequence[Plugin],
    depth: int,
    prefix: int,
    grid: tuple[int, int],
    n: int,
    strict: bool = False,
) -> list[Plan]:
    """Walk through the blocks with counts only.

    Args:
        reducer: The method, or None.
        schedule: Its schedule, or None.
        plugins: Parts that add tokens.
        depth: Number of blocks.
        prefix: Number of prefix tokens.
        grid: Patch grid.
        n: Reducible tokens at the start.
        strict: Raise where the schedule asks for more than the method can remove.

    Raises:
        UnreachableBudget: If `strict` and something is out of reach.
    """
    n0 = n
    n += sum(p.added(-1, depth) for p in plugins)
    site = "mid" if reducer is None else reducer.site
    rows: list[tuple[int, int, int, int]] = []
    steps: list[Step | None] = []
    for block in range(depth):
        step = None
        if reducer is not None and schedule is not None:
            if strict:
                _check(reducer, schedule, block, depth, n, n0)
            step = _step(reducer, schedule, block, depth, n, n0, grid)
        after = n if step is None or reducer is None else reducer.count(n, step)
        at_attention = after if site == "pre" else n
        at_mlp = n if site == "post" else after
        leaving = after + sum(p.added(block, depth) for p in plugins)
        rows.append((n, at_attention, at_mlp, leaving))
        steps.append(step)
        n = leaving
    return [
        Plan(*(count + prefix for count in row), step, _need(reducer, block, steps))
        for block, (row, step) in enumerate(zip(rows, steps, strict=True))
    ]


def _step(
    reducer: Reducer,
    schedule: Schedule,
    block: int,
    depth: int,
    n: int,
    n0: int,
    grid: tuple[int, int],
) -> Step | None:
    """The reduction of one block, with the request clipped to what the method can do."""
    budget = schedule.budget(block, depth, n, n0)
    keep = n if budget is None else max(budget.keep, n - reducer.max_drop(n), 1)
    if keep >= n:
        return Step(block, depth, Budget(n), grid) if reducer.every_block else None
    assert budget is not None
    return Step(block, depth, budget._replace(keep=keep), grid)


def _need(reducer: Reducer | None, block: int, steps: Sequence[Step | None]) -> frozenset[str]:
    """Signals of a block: for its own reduction, or at its end for the next block's "pre"."""
    if reducer is None:
        return frozenset()
    if reducer.site == "pre":
        block += 1
    active = block < len(steps) and steps[block] is not None
    return reducer.needs if active else frozenset()


def _check(reducer: Reducer, schedule: Schedule, block: int, depth: int, n: int, n0: int) -> None:
    budget = schedule.budget(block, depth, n, n0)
    limit = reducer.max_drop(n)
    if budget is not None and schedule.refuses(block, depth, n, n0, limit):
        raise UnreachableBudget(
            f"{schedule!r} removes {n - budget.keep} of {n} tokens in block {block}, but "
            f"{reducer.name or type(reducer).__name__} can remove at most {limit} there; "
            "remove fewer, or clip with strict=False (schedule.strict=false)"
        )
