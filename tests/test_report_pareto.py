"""The Pareto front."""

import random

import pytest

from zoo.report.pareto import pareto_front


@pytest.mark.parametrize(
    ("points", "front"),
    [
        ([], []),
        ([(1, 1)], [True]),
        ([(1, 70), (2, 80), (3, 75)], [True, True, False]),
        ([(2, 80), (2, 80), (3, 80)], [True, True, False]),  # equal points, then a tie in score
        ([(1, 70), (1, 71)], [False, True]),  # a tie in cost
        ([(1, None), (None, 99), (2, 50), (float("nan"), 60)], [False, False, True, False]),
    ],
)
def test_pareto_by_hand(points, front):
    assert pareto_front(points) == front


def test_pareto_agrees_with_the_definition():
    draw = random.Random(0)
    for _ in range(200):
        points = [(draw.randint(0, 6), draw.randint(0, 6)) for _ in range(draw.randint(1, 14))]

        def beaten(p, points=points):
            return any(q[0] <= p[0] and q[1] >= p[1] and q != p for q in points)

        assert pareto_front(points) == [not beaten(p) for p in points]
