"""Budgets that are solved for: a cost is given, the schedule of a family is found."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from reduction.checks import boolean, count, listed, one_of, positive, share
from reduction.counts import Budget
from reduction.errors import UnreachableBudget, ZooError
from reduction.schedules.base import Schedule
from reduction.schedules.constant_r import ConstantR
from reduction.schedules.keep_rate import KeepRate


class Target(Schedule):
    """A budget from which a schedule is found when a model is built.

    Attributes:
        family: Schedule family whose one free parameter is solved for; None: the method's own.
        blocks: Blocks for the families that take them.
    """

    family: str | None = None
    blocks: list[int] | None = None

    def _set_family(self, family: str | None, blocks: Sequence[int] | None) -> None:
        self.family = None if family is None else one_of("family", family, sorted(_FAMILIES))
        self.blocks = None
        if blocks is not None:
            self.blocks = [
                count("blocks", b, 0) for b in listed("blocks", blocks, "a list of blocks")
            ]
        if self.blocks is not None and family == "constant_r":
            raise ZooError("blocks belong to family='keep_rate'")

    def members(self, n0: int, family: str) -> tuple[str, Callable[[float], Schedule]]:
        """The family to search: its name, and a schedule for each strength in [0, 1].

        Args:
            n0: Reducible tokens at the start.
            family: Family of the method, used when none was chosen.
        """
        kind = self.family or family
        if self.blocks is not None and kind == "constant_r":
            kind = "keep_rate"
        make = _FAMILIES[kind](self, n0)

        def aligned(strength: float) -> Schedule:
            made = make(strength)
            made.choose(align=self.align)
            return made

        return kind, aligned

    def budget(self, block: int, depth: int, n: int, n0: int) -> Budget | None:
        """Refuses: see `members`."""
        raise ZooError(f"{self.name} is solved when a model is built; it has no budget by itself")


class TargetGmacs(Target):
    """The schedule of a family that costs at most so much, the reducer's own products included.

    A model solves it when it is built (`solve`), so all methods can be compared at equal cost.

    Args:
        gmacs: Cost in 1e9 multiply-accumulates per image. Wins over `fraction`.
        fraction: Cost as a share of the dense model's.
        family: "constant_r" (r is solved), "keep_rate" or "geometric" (the rate is); None: the
            method's own.
        blocks: Blocks for the families that take them.
        nearest: Where the family cannot go as low as the target, take the lowest it can reach
            instead of refusing.

    Raises:
        ZooError: If the target is not positive.
    """

    name = "target_gmacs"

    def __init__(
        self,
        gmacs: float | None = None,
        fraction: float = 0.5,
        family: str | None = None,
        blocks: Sequence[int] | None = None,
        nearest: bool = False,
    ) -> None:
        self.gmacs = positive("gmacs", gmacs, null=True)
        self.fraction = share("fraction", fraction, zero=False)
        self.nearest = boolean("nearest", nearest)
        self._set_family(family, blocks)

    def solve(
        self, cost: Callable[[Schedule], float], dense: float, n0: int, family: str
    ) -> Schedule:
        """Find the most expensive schedule of the family that stays within the target.

        Args:
            cost: GMACs of the model under a schedule; must not increase with more reduction.
            dense: GMACs with nothing reduced.
            n0: Reducible tokens at the start.
            family: Family of the method, used when none was chosen.

        Raises:
            UnreachableBudget: With the nearest cost that can be reached.
        """
        target = self.gmacs if self.gmacs is not None else self.fraction * dense
        # Asking for exactly the dense cost is reachable: with nothing reduced.
        if target > dense * (1 + 1e-9):
            raise UnreachableBudget(
                f"target of {target:.4g} GMACs is above the dense model; the nearest that can be "
                f"reached is {dense:.4f} with nothing reduced"
            )
        kind, make = self.members(n0, family)
        floor = cost(make(1.0))
        if floor > target and self.nearest:
            return make(1.0)
        if floor > target:
            raise UnreachableBudget(
                f"target of {target:.4g} GMACs is below what family {kind!r} can reach; the "
                f"nearest that can be reached is {floor:.4f}"
            )
        low, high = 0.0, 1.0
        if cost(make(0.0)) <= target:
            return make(0.0)
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (low, middle) if cost(make(middle)) <= target else (middle, high)
        return make(high)


def _keep_rate_family(target: Target, n0: int) -> Callable[[float], Schedule]:
    def make(strength: float) -> Schedule:
        # A rate of zero is no keep rate; one millionth keeps one token of any image.
        return KeepRate(max(1.0 - strength, 1e-6), blocks=target.blocks, strict=False)

    return make


def _constant_r_family(target: Target, n0: int) -> Callable[[float], Schedule]:
    def make(strength: float) -> Schedule:
        return ConstantR(float(strength * n0), strict=False)

    return make


_FAMILIES: dict[str, Callable[[Target, int], Callable[[float], Schedule]]] = {
    "keep_rate": _keep_rate_family,
    "constant_r": _constant_r_family,
}


def register_family(name: str, make: Callable[[Target, int], Callable[[float], Schedule]]) -> None:
    """Add a schedule family for targets.

    Args:
        name: Name of the family, as in `Reducer.family`.
        make: Called with the target and n0, returns a function from strength in [0, 1] (0 removes
            nothing, 1 all it can) to a schedule.
    """
    _FAMILIES[name] = make
