"""Token counts of every block from plain integers, known before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from reduction.base import Reducer
from reduction.counts import Budget, Step
from reduction.eager import traced
from reduction.errors import UnreachableBudget
from reduction.mixins.following import Follows
from reduction.mixins.parking import Parks
from reduction.schedules.base import Schedule
from reduction.tokens import SIGNALS
from zoo.model.aligned import Aligned
from zoo.model.anatomy import Anatomy
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
        entry: The reduction before the first block, of which `entering` is the result; there only.
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
    entry: Step | None = None


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


def make_plan(
    anatomy: Anatomy,
    schedule: Schedule | None,
    grid: tuple[int, int] | None = None,
    n: int | None = None,
    strict: bool = False,
    last_block: str = "full",
) -> list[Plan]:
    """Token counts of every block, from plain integers.

    Args:
        anatomy: The parts of the model.
        schedule: Of the reducer, or None.
        grid: Patch grid; None is the backbone's own.
        n: Reducible tokens at the start; None is one per patch.
        strict: Raise where the schedule asks for more than the method can remove.
        last_block: See `zoo.model.runtime.Runtime`.

    Raises:
        UnreachableBudget: If `strict` and something is out of reach.
    """
    grid = grid or anatomy.grid
    if anatomy.alone is not None:
        counts = anatomy.alone.token_counts(grid)
        return [Plan(n, n, n, after, None, frozenset()) for n, after in counts]
    patches = grid[0] * grid[1] if n is None else n
    plans = _walk(anatomy, schedule, grid, patches, strict)
    if schedule is not None and schedule.align != 1:
        plans = _walk(anatomy, schedule, grid, patches, strict, Aligned(schedule.align, plans))
    if last_block == "class_token":
        site = "mid" if anatomy.reducer is None else anatomy.reducer.site
        plans = only_prefix_at_the_end(plans, anatomy.prefix, site)
    return plans


def dense_plan(
    anatomy: Anatomy, grid: tuple[int, int] | None = None, last_block: str = "full"
) -> list[Plan]:
    """The plan with nothing reduced and nothing added.

    Args:
        anatomy: The parts of the model.
        grid: Patch grid; None is the backbone's own.
        last_block: See `zoo.model.runtime.Runtime`.
    """
    rows, columns = grid or anatomy.grid
    n = rows * columns + anatomy.prefix
    plans = [Plan(n, n, n, n, None, frozenset()) for _ in range(anatomy.depth)]
    if last_block == "class_token":
        plans = only_prefix_at_the_end(plans, anatomy.prefix, "mid")
    return plans


def _walk(
    anatomy: Anatomy,
    schedule: Schedule | None,
    grid: tuple[int, int],
    n: int,
    strict: bool,
    aligned: Aligned | None = None,
) -> list[Plan]:
    """Walk through the blocks with counts only; `aligned` rounds those of a walk before."""
    reducer, plugins, depth, prefix = (
        anatomy.reducer,
        anatomy.plugins,
        anatomy.depth,
        anatomy.prefix,
    )
    n0 = n
    entry = None
    if reducer is not None and schedule is not None and reducer.site == "input":
        if aligned is None:
            first = _first(schedule, depth, n)
            if strict:
                _check(reducer, schedule, first, depth, n, n0)
            found = _step(reducer, schedule, first, depth, n, n0, grid)
            entry = None if found is None else found._replace(block=0)
        else:
            entry = aligned.entry(reducer, n, prefix)
        n = n if entry is None else reducer.count(n, entry)
    # Not in place: a tracer makes tensors of sizes.
    n = n + sum(p.added(-1, depth) for p in plugins)
    spared = [_spared(reducer, plugins, block, depth) for block in range(depth)]
    site = "mid" if reducer is None else reducer.site
    rows: list[tuple[int, int, int, int]] = []
    steps: list[Step | None] = []
    restored = [False] * depth
    parks = reducer.parks if isinstance(reducer, Parks) else "no"
    since = 0
    parked, last = 0, None  # tokens that would come back, and the step that took them out
    for block in range(depth):
        step = None
        acts = site != "input" and reducer is not None and reducer.acts(block, depth)
        if acts and reducer is not None and schedule is not None:
            free = n + parked - spared[block]
            if aligned is not None:
                step = aligned.step(reducer, block, free, prefix + spared[block])
            else:
                if strict:
                    _check(reducer, schedule, block, depth, free, n0)
                step = _step(reducer, schedule, block, depth, free, n0, grid)
        if parks == "block" and step is None and last is not None:
            assert isinstance(reducer, Parks)
            if reducer.lasts(block, since):
                step = last._replace(block=block, again=True)
        elif step is not None:
            since = block
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
    if parked and isinstance(reducer, Parks) and reducer.restores(depth - 1, depth):
        restored[-1] = True
        rows[-1] = (*rows[-1][:3], n + parked)
    plans: list[Plan] = []
    for block, counts in enumerate(rows):
        entering, attention, mlp, leaving = (count + prefix for count in counts)
        need = _need(reducer, block, steps)
        more = steps[block], need, spared[block], restored[block]
        plans.append(Plan(entering, attention, mlp, leaving, *more))
    return [plans[0]._replace(entry=entry), *plans[1:]]


def _first(schedule: Schedule, depth: int, n: int) -> int:
    """The first block that a schedule has a budget for, which is that of what enters block 0."""
    budgets = (schedule.budget(block, depth, n, n) for block in range(depth))
    return next((i for i, budget in enumerate(budgets) if budget is not None), 0)


def _spared(reducer: Reducer | None, plugins: Sequence[Plugin], block: int, depth: int) -> int:
    """Trailing tokens that the reduction of a block leaves alone; all came from plugins."""
    # Inside an attention tokens are not split; there the reduction sees them all.
    if reducer is None or reducer.site == "attn":
        return 0
    if reducer.added_tokens == "spare":
        return sum(p.added(b, depth) for p in plugins for b in range(-1, block))
    count = max([0, *(p.spared(block, depth) for p in plugins)])
    if reducer.site == "pre" and reducer.needs & SIGNALS and block > 0:
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
    if reducer is None:
        return frozenset()
    if isinstance(reducer, Follows):
        listens = reducer.listens(block, steps)
    else:
        read = block + (reducer.site == "pre")  # "pre" reads what the block before said
        listens = read < len(steps) and steps[read] is not None
    return reducer.needs & SIGNALS if listens else frozenset()


def _check(reducer: Reducer, schedule: Schedule, block: int, depth: int, n: int, n0: int) -> None:
    budget = schedule.budget(block, depth, n, n0)
    limit = reducer.max_drop(n)
    if budget is not None and schedule.refuses(block, depth, n, n0, limit):
        raise UnreachableBudget(
            f"{schedule!r} removes {n - budget.keep} of {n} tokens in block {block}, but "
            f"{reducer.name or type(reducer).__name__} can remove at most {limit} there; "
            "remove fewer, or clip with strict=False (schedule.strict=false)"
        )


class Planner:
    """Plans of one model, remembered until its schedule or its reducer changes."""

    def __init__(self) -> None:
        self._stamp: Any = None
        self._plans: dict[Any, list[Plan]] = {}

    def plan(
        self,
        anatomy: Anatomy,
        schedule: Schedule | None,
        grid: tuple[int, int],
        n: int,
        last_block: str,
    ) -> list[Plan]:
        """`make_plan` for images that are here.

        Args:
            anatomy: Of the model.
            schedule: Of its reducer.
            grid: Patch grid of the images.
            n: Their reducible tokens.
            last_block: See `zoo.model.runtime.Runtime`.
        """
        if isinstance(n, Tensor):  # torch.jit.trace; shares of it would be rounded in float32
            n = int(n)
        # A tracer makes tensors of sizes, and a plugin may change its mind at any time.
        if traced() or len(anatomy.plugins):
            return make_plan(anatomy, schedule, grid, n, last_block=last_block)
        state = None if schedule is None else dict(vars(schedule))
        reducer = anatomy.reducer
        stamp = (schedule, state, None if reducer is None else reducer.revision)
        if self._stamp != stamp:
            self._plans.clear()
            self._stamp = stamp
        key = (grid, n, last_block)
        if key not in self._plans:
            self._plans[key] = make_plan(anatomy, schedule, grid, n, last_block=last_block)
        return self._plans[key]
