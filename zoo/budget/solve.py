"""From a target to a schedule, before there is a model."""

from __future__ import annotations

from reduction.errors import UnreachableBudget
from reduction.schedules.base import Schedule
from reduction.schedules.target import Target, TargetGmacs
from zoo.budget.time import TargetTime
from zoo.cost.analytic import gmacs, patch_and_head_gmacs
from zoo.errors import ZooError
from zoo.model.anatomy import Anatomy, check_parts, check_together


def solve(target: Target, anatomy: Anatomy, last_block: str = "full") -> Schedule:
    """Find the schedule that meets a target.

    Plugins are set up for it, since what they add to the tokens costs something too.

    Args:
        target: In GMACs, milliseconds or a speed-up.
        anatomy: The parts of the model that is to have the schedule.
        last_block: See `zoo.model.runtime.Runtime`.

    Returns:
        A schedule of the target's family.

    Raises:
        UnreachableBudget: With the nearest that can be reached.
        ZooError: If there is no reducer, or the parts cannot work together.
    """
    check_parts(*anatomy)
    for plugin in anatomy.plugins:
        plugin.setup(anatomy.backbone, target)
    check_together(anatomy)
    if anatomy.reducer is None:
        raise ZooError(f"{target.name} needs a reducer, got none; choose one, e.g. reducer='tome'")
    if isinstance(target, TargetTime):
        return target.solve(anatomy, last_block)
    if not isinstance(target, TargetGmacs):
        raise ZooError(f"nothing here solves a {type(target).__name__}")
    fixed = patch_and_head_gmacs(anatomy.backbone)

    def cost(schedule: Schedule | None) -> float:
        return gmacs(anatomy, schedule, fixed, last_block).total

    try:
        return target.solve(cost, cost(None), anatomy.patches, anatomy.reducer.family)
    except UnreachableBudget as error:
        raise UnreachableBudget(f"{anatomy.reducer.name or 'reducer'}: {error}") from error
