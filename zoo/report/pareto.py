"""The Pareto front of cost against score."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby

Point = tuple[float | None, float | None]


def pareto_front(points: Sequence[Point]) -> list[bool]:
    """Tell which points no other point beats.

    A point is beaten when another is at least as cheap and at least as good, and better in one of
    the two. So of equal points either all are on the front or none, and of points with the same
    cost (or the same score) only the best remain.

    Args:
        points: (cost, score) pairs: lower cost and higher score are better. A pair with a None or
            a NaN is never on the front and beats nothing.

    Returns:
        One bool per point, in the order given.

    >>> pareto_front([(1.0, 70.0), (2.0, 80.0), (2.0, 75.0), (3.0, 80.0), (None, 99.0)])
    [True, True, False, False, False]
    """
    known = [
        (cost, score, index)
        for index, (cost, score) in enumerate(points)
        if cost is not None and score is not None and not math.isnan(cost + score)
    ]
    on_front = [False] * len(points)
    best = -math.inf
    for _, same_cost in groupby(sorted(known), key=lambda point: point[0]):
        group = list(same_cost)
        top = max(score for _, score, _ in group)
        if top > best:
            best = top
            for _, score, index in group:
                on_front[index] = score == top
    return on_front
