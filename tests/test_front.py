"""The picture of the front page: its lines are those of the rows."""

from __future__ import annotations

import pytest

from benchmarks import front
from tests.test_leaderboard import KNN, row


def sample(method: str, fraction: float | None, agreement: float, sizes: object = "paper", **more):
    reducer = {"name": method, "prop_attn": sizes}
    knn = KNN | {"agreement": agreement}
    return row(method, fraction, reducer=reducer, knn=knn, **more)


ROWS = [
    sample("none", None, 100.0, img_size=224, gmacs={"total": 6.0}),
    sample("none", None, 75.0, img_size=196, gmacs={"total": 4.5}, gmacs_dense=4.5),
    sample("tome", 0.35, 96.0, True),
    sample("tome", 0.75, 99.0, True),
    sample("tome", 0.35, 16.0, False),
    sample("topk", 0.35, 21.0),
    sample("tome", 0.35, 1.0, True, dataset="openclipart"),
    sample("tome", 0.35, 1.0, True, gallery="own"),
]


def test_lines_are_those_of_the_rows() -> None:
    found = front.curves(ROWS)
    assert found == {
        ("none", None): [(75.0, 75.0), (100.0, 100.0)],
        ("tome", True): [(35.0, 96.0), (75.0, 99.0)],
        ("tome", False): [(35.0, 16.0)],
        ("topk", None): [(35.0, 21.0)],
    }


def test_the_picture_names_what_it_draws() -> None:
    pytest.importorskip("matplotlib")
    figure = front.draw(ROWS)
    said = [text.get_text() for text in figure.axes[0].texts]
    assert {"ToMe", "ToMe without sizes", "Top-K by class attention"} <= set(said)
    assert "random tokens" not in said  # no rows
