"""Fixed patterns: keep what is near the centre of the image."""

from __future__ import annotations

import functools

import torch

from reduction.assignment import Keep
from reduction.base import Card, Reducer
from reduction.checks import count, number, one_of
from reduction.counts import Budget, Step
from reduction.errors import ZooError
from reduction.registry import register
from reduction.schedules.base import Schedule
from reduction.tokens import Signals, Tokens

PATTERNS = ("l1", "l2", "linf")


def _axis(length: int) -> list[float]:
    # Python's floor: odd lengths come out off-centre, as in the official code.
    low, high = -length // 2, length // 2
    return torch.linspace(low, high, length).tolist()


@functools.lru_cache(maxsize=64)
def _distances(pattern: str, grid: tuple[int, int]) -> tuple[float, ...]:
    y = torch.tensor(_axis(grid[0])).unsqueeze(1)
    x = torch.tensor(_axis(grid[1])).unsqueeze(0)
    if pattern == "l1":
        z = x.abs() + y.abs()
    elif pattern == "l2":
        z = (x.square() + y.square()).sqrt()
    else:
        z = torch.maximum(x.abs().expand(grid), y.abs().expand(grid))
    return tuple(z.reshape(-1).tolist())


@functools.lru_cache(maxsize=64)
def _ring_counts(pattern: str, grid: tuple[int, int]) -> tuple[int, ...]:
    z = _distances(pattern, grid)
    return tuple(sum(v <= edge for v in z) for edge in sorted(set(z)))


# Compilers must take these numbers instead of tracing how they come about: float32 sums of equal
# distances may differ in the last bit and then count as two rings, in the official code as here.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def distances(pattern: str, grid: tuple[int, int]) -> tuple[float, ...]:
    """Distance of each patch from the centre, row-major, as the official code measures it."""
    return _distances(pattern, grid)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def ring_counts(pattern: str, grid: tuple[int, int]) -> tuple[int, ...]:
    """Number of patches within each distinct distance, ascending."""
    return _ring_counts(pattern, grid)


class Radius(Schedule):
    """Shrink a fixed pattern in equal steps of its radius ("contiguous" in the official code).

    Args:
        pattern: "l1", "l2" or "linf"; must be the reducer's.
        start: First block that reduces.
        stop: Last block that reduces.
        min_radius: Radius that the shrinking aims at; 0 or less means the innermost patch's.

    Raises:
        ZooError: If the pattern is unknown or the blocks are out of order.

    References:
        Haurum et al., arXiv 2308.04657; official code (MIT). The thresholds follow that code,
        block `stop` one step short of `min_radius` included.
    """

    name = "radius"

    def __init__(self, pattern: str, start: int, stop: int, min_radius: float = 1.0) -> None:
        self.pattern = one_of("pattern", pattern, PATTERNS)
        self.start = count("start", start, 0)
        self.stop = count("stop", stop, 0)
        self.min_radius = number("min_radius", min_radius)
        if start > stop:
            raise ZooError(f"expected 0 <= start <= stop, got start={start}, stop={stop}")

    def budget(self, block: int, depth: int, n: int, n0: int) -> Budget | None:
        if not self.start <= block <= self.stop:
            return None
        side = round(n0**0.5)
        if side * side != n0:
            raise ZooError(f"schedule 'radius' needs a square patch grid, got {n0} patches")
        z = distances(self.pattern, (side, side))
        centre = z[(side // 2) * side + side // 2]
        inner = self.min_radius if self.min_radius > 0 else centre
        steps = torch.linspace(z[0], inner, self.stop - self.start + 3).tolist()
        thresholds = [z[0]] * max(self.start - 1, 0) + steps
        return Budget(max(1, sum(v <= thresholds[block] for v in z)))


@register("heuristic")
class Heuristic(Reducer):
    """Keep the patches nearest to the centre in the l1, l2 or l-infinity sense.

    Only whole rings are kept: of all rings, the one whose count is closest to the budget. The
    official code masks the others as keys and saves nothing; here they are removed, which gives
    the same output.

    Args:
        pattern: "l1", "l2" or "linf".

    Raises:
        ZooError: If the pattern is unknown.

    References:
        Haurum et al., ICCVW 2023, arXiv 2308.04657; official code
        github.com/JoakimHaurum/TokenReduction (MIT).
    """

    card = Card(
        title="Which Tokens to Use? Investigating Token Reduction in Vision Transformers",
        authors="Haurum et al.",
        venue="ICCVW",
        year=2023,
        arxiv="2308.04657",
        code="https://github.com/JoakimHaurum/TokenReduction",
        licence="MIT",
        kind="pattern",
        training="fine-tuning recommended",
        note="Ignores the image; for data with centred objects.",
    )
    site = "pre"
    needs = frozenset({"origin"})
    # They stand nowhere, and whole rings are counted.
    added_tokens = "spare"

    def __init__(self, pattern: str = "l2") -> None:
        super().__init__()
        self.pattern = one_of("pattern", pattern, PATTERNS)

    def count(self, n: int, step: Step) -> int:
        rings: tuple[int, ...] = ring_counts(self.pattern, step.grid)
        # min() takes the first of equals, as the official code does.
        return min(n, min(rings, key=lambda count: abs(count - step.keep)))

    def assign(self, t: Tokens, s: Signals, step: Step) -> Keep:
        assert t.origin is not None
        z = torch.tensor(distances(self.pattern, step.grid), device=t.x.device)
        # Tokens that stand for no patch (added by a plugin) have no distance: they stay.
        near = torch.where(t.origin < 0, -1.0, z[t.origin.clamp_min(0)])
        kept = near.topk(self.count(t.n, step), dim=1, largest=False, sorted=False).indices
        return Keep(kept.sort(dim=1).values)
