"""The schedule of fixed patterns: their radius shrinks in equal steps."""

from __future__ import annotations

import torch

from reduction.checks import count, number, one_of
from reduction.counts import Budget
from reduction.errors import ZooError
from reduction.functional.patterns import PATTERNS, distances
from reduction.schedules.base import Schedule


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
