"""Token counts of every block from plain integers, known before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from reduction.base import Budget, Reducer, Step
from reduction.errors import UnreachableBudget
from reduction.schedule import Schedule
from zoo.errors import ZooError
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
        spared: Trailing tokens that the reduction leaves alone.
        restore: Whether parked tokens come back behind the block.
        rows: Leading rows that the attention puts out and that go on; None is all.
    """

    entering: int
    attention: int
    mlp: int
    leaving: int
    step: Step | None
    need: frozenset[str]
    spared: int = 0
    restore: bool = False
    rows: int | None = None


def only_prefix_at_the_end(plans: list[Plan], prefix: int, site: str) -> list[Plan]:
    """The same plan, with a last block that puts out the prefix tokens alone.

    All tokens are still there as keys and values. A reduction in that block happens only where it
    is before the block.

    Args:
        plans: Of all blocks.
        prefix: Number of prefix tokens.
        site: Where the reducer acts.
    """
    last = plans[-1]._replace(
        mlp=prefix, leaving=prefix, need=frozenset(), spared=0, restore=False, rows=prefix
    )
    if site != "pre":
        last = last._replace(step=None)
    return [*plans[:-1], last]


def check_plugins(reducer: Reducer | None, plugins: Sequence[Plugin], depth: int) -> None:
    """Refuse a reducer and plugins that cannot work together.

    Raises:
        ZooError: Naming both.
    """
    heads = [p.name for p in plugins if p.replaces_head]
    if len(heads) > 1:
        raise ZooError(f"plugins {heads} all bring a classifier; choose one of them")
    for plugin in plugins:
        if reducer is None or not any(plugin.added(b, depth) for b in range(-1, depth)):
            continue
        pair = f"reducer {reducer.name!r} with plugin {plugin.name!r}"
        if reducer.added_tokens == "refuse":
            raise ZooError(
                f"{pair}: this method keeps its own account of the tokens and takes none that a "
                "plugin adds; plugin 'cla' adds none"
            )
        if plugin.protected and reducer.site == "attn":
            raise ZooError(
                f"{pair}: tokens cannot be protected from a method that removes them inside the "
                "attention; use protected=false"
            )


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
    # Not in place: a tracer makes tensors of sizes.
    n = n + sum(p.added(-1, depth) for p in plugins)
    spared = [_spared(reducer, plugins, block, depth) for block in range(depth)]
    site = "mid" if reducer is None else reducer.site
    rows: list[tuple[int, int, int, int]] = []
    steps: list[Step | None] = []
    restored = [False] * depth
    parks = "no" if reducer is None else reducer.parks
    parked, last = 0, None  # tokens that would come back, and the step that took them out
    for block in range(depth):
        step = None
        if reducer is not None and schedule is not None and reducer.acts(block, depth):
            free = n + parked - spared[block]
            if strict:
                _check(reducer, schedule, block, depth, free, n0)
            step = _step(reducer, schedule, block, depth, free, n0, grid)
        if parks == "block" and step is None and last is not None:
            step = last._replace(block=block)
        if parked and step is not None:
            restored[block - 1] = True
            n = n + parked
            rows[-1] = (*rows[-1][:3], n)
            parked = 0
        after = n
        if step is not None and reducer is not None:
            after = reducer.count(n - spared[block], step) + spared[block]
            if parks != "no":
                parked, last = n - after, step
        at_attention = after if site == "pre" else n
        at_mlp = n if site == "post" else after
        leaving = after + sum(p.added(block, depth) for p in plugins)
        rows.append((n, at_attention, at_mlp, leaving))
        steps.append(step)
        n = leaving
    if parked and reducer is not None and reducer.restores(depth - 1, depth):
        restored[-1] = True
        rows[-1] = (*rows[-1][:3], n + parked)
    return [
        Plan(
            *(count + prefix for count in rows[block]),
            steps[block],
            _need(reducer, block, steps),
            spared[block],
            restored[block],
        )
        for block in range(depth)
    ]


def _spared(reducer: Reducer | None, plugins: Sequence[Plugin], block: int, depth: int) -> int:
    """Trailing tokens that the reduction of a block leaves alone; all came from plugins."""
    # Inside an attention tokens are not split; there the reduction sees them all.
    if reducer is None or reducer.site == "attn":
        return 0
    if reducer.added_tokens == "spare":
        return sum(p.added(b, depth) for p in plugins for b in range(-1, block))
    count = max([0, *(p.spared(block, depth) for p in plugins)])
    if reducer.site == "pre" and reducer.needs and block > 0:
        # Signals of the previous block do not know what was appended behind it.
        count = max(count, sum(p.added(block - 1, depth) for p in plugins))
    return count


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
    """Signals that the attention of a block computes."""
    if reducer is None or not reducer.needs or not reducer.listens(block, steps):
        return frozenset()
    return reducer.needs


def _check(reducer: Reducer, schedule: Schedule, block: int, depth: int, n: int, n0: int) -> None:
    budget = schedule.budget(block, depth, n, n0)
    limit = reducer.max_drop(n)
    if budget is not None and schedule.refuses(block, depth, n, n0, limit):
        raise UnreachableBudget(
            f"{schedule!r} removes {n - budget.keep} of {n} tokens in block {block}, but "
            f"{reducer.name or type(reducer).__name__} can remove at most {limit} there; "
            "remove fewer, or clip with strict=False (schedule.strict=false)"
        )
