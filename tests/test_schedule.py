"""Counts of every schedule, by hand and by the published tables."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import zoo
from reduction import (
    ConstantR,
    KeepRate,
    PerBlock,
    TargetGmacs,
    UnreachableBudget,
    ZooError,
    create_schedule,
    list_schedules,
)
from reduction.functional.patterns import ring_counts
from reduction.schedules.radius import Radius
from tests.cases import backbone


def counts(schedule, depth: int, n: int) -> list[int]:
    """Tokens after each block."""
    out, n0 = [], n
    for block in range(depth):
        budget = schedule.budget(block, depth, n, n0)
        n = n if budget is None else min(n, budget.keep)
        out.append(n)
    return out


@pytest.mark.parametrize(
    ("rate", "expected"),
    [
        (0.9, [176, 158, 142]),
        (0.8, [156, 125, 100]),
        (0.7, [137, 96, 67]),
        (0.6, [117, 70, 42]),
        (0.5, [98, 49, 24]),
        (0.25, [49, 12, 3]),
    ],
)
def test_keep_rate_of_haurum(rate: float, expected: list[int]) -> None:
    after = counts(KeepRate(rate), 12, 196)
    assert after == [196] * 3 + [expected[0]] * 3 + [expected[1]] * 3 + [expected[2]] * 3


def test_keep_rate_of_evit_counts_the_fused_token() -> None:
    schedule = KeepRate(0.7, rounding="ceil", of="current")
    m = zoo.create_model("deit_small_patch16_224", "evit", schedule)
    assert [leaving for _, leaving in m.token_counts()][3::3] == [1 + 139, 1 + 99, 1 + 71]


def test_keep_rate_lists_are_shares_of_the_start() -> None:
    assert counts(KeepRate([0.5, 0.25], blocks=[1, 2]), 4, 100) == [100, 50, 25, 25]
    current = KeepRate([0.5, 0.5], blocks=[1, 2], of="current", rounding="ceil")
    assert counts(current, 4, 99) == [99, 50, 25, 25]


def test_constant_r_and_its_forms() -> None:
    assert counts(ConstantR(13), 12, 196)[-1] == 196 - 12 * 13
    assert counts(ConstantR([0, 16, 3]), 4, 64) == [64, 48, 45, 45]
    assert counts(ConstantR(8, inflection=-1.0), 6, 64) == [48, 36, 27, 21, 18, 18]
    assert counts(ConstantR(0), 3, 10) == [10, 10, 10]


@settings(max_examples=50, deadline=None)
@given(st.floats(0, 8), st.integers(1, 24))
def test_fractional_r_never_drifts(r: float, depth: int) -> None:
    after = counts(ConstantR(r), depth, 1000)
    for block, n in enumerate(after):
        assert abs((1000 - n) - r * (block + 1)) < 1


def test_a_long_list_of_r_warns() -> None:
    with pytest.warns(UserWarning, match="ignored"):
        assert counts(ConstantR([1, 2, 3]), 2, 10) == [9, 7]


def test_per_block_lists_and_files(tmp_path: Path) -> None:
    assert counts(PerBlock([None, 30, 20]), 3, 40) == [40, 30, 20]
    # Entries beyond what is there do nothing.
    assert counts(PerBlock([50, 30, 35]), 3, 40) == [40, 30, 30]
    both = PerBlock([31, 21], prune=[36, 21], prefix=1)
    assert both.budget(0, 2, 40, 40) == (30, 35)
    file = tmp_path / "schedule.json"
    file.write_text(json.dumps({"keep": [31, 21], "prune": [36, 21], "prefix": 1}))
    assert PerBlock(file=str(file)) == both
    file.write_text('{"keep": [31, ')
    with pytest.raises(ZooError, match="cannot read a schedule"):
        PerBlock(file=str(file))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "keep_rate", "rate": 1.3}, r"keep rate must be in \(0, 1\], got 1.3"),
        ({"name": "keep_rate", "rate": 0}, r"must be in \(0, 1\]"),
        ({"name": "keep_rate", "rate": "0.7"}, r"must be in \(0, 1\]"),
        ({"name": "keep_rate", "rounding": "up"}, "rounding must be one of"),
        ({"name": "keep_rate", "of": "start"}, "'initial' or 'current'"),
        ({"name": "keep_rate", "blocks": [3, 1]}, "increasing"),
        ({"name": "keep_rate", "rate": [0.5, 0.4], "blocks": [3]}, "2 rates for 1 blocks"),
        ({"name": "constant_r", "r": -1}, "0 or more"),
        ({"name": "constant_r", "r": None}, "must be a number"),
        ({"name": "constant_r", "r": 3, "inflection": 2}, r"\[-1, 1\]"),
        ({"name": "per_block"}, r"keep=\[...\]"),
        ({"name": "per_block", "keep": [3, 0]}, "at least 1"),
        ({"name": "per_block", "keep": [3], "prune": [3, 4]}, "1 entries but prune 2"),
        ({"name": "target_gmacs", "gmacs": 0}, "must be positive"),
        ({"name": "target_gmacs", "fraction": 1.5}, r"\(0, 1\]"),
        ({"name": "target_gmacs", "family": "linear"}, "family must be one of"),
        ({"name": "constant"}, "constant_r"),
        ({"name": "constant_r", "rr": 3}, "rr"),
        ({"r": 3}, "mapping like"),
        ("tome", "unknown schedule 'tome'"),
    ],
)
def test_bad_schedules_say_what_is_wrong(spec, message: str) -> None:
    with pytest.raises(ZooError, match=message):
        create_schedule(spec)


def test_config_builds_the_same_schedule() -> None:
    for schedule in (
        ConstantR(12.5),
        ConstantR(8, -0.5),
        ConstantR([1, 2]),
        KeepRate([0.5, 0.3], [1, 2], "ceil", "current", False),
        PerBlock([5, None], [6, None], 1),
        TargetGmacs(2.9),
        Radius("l1", 1, 3, 0.5),
    ):
        text = json.dumps(schedule.config())
        assert create_schedule(json.loads(text)) == schedule
    assert {"constant_r", "keep_rate", "per_block", "target_gmacs", "radius"} <= set(
        list_schedules()
    )


def test_what_a_method_cannot_remove_is_refused_or_clipped() -> None:
    m = backbone("plain")
    with pytest.raises(UnreachableBudget, match=r"block 1.*at most 19"):
        zoo.wrap(m, "tome", {"name": "constant_r", "r": 25})
    clipped = zoo.wrap(m, "tome", {"name": "constant_r", "r": 1000, "strict": False})
    assert [n for _, n in clipped.token_counts()] == [33, 17, 9, 5]
    # Published settings may run short of pairs at the end, and half of an odd number is rounding.
    late = zoo.wrap(m, "tome", {"name": "constant_r", "r": 15})
    assert [n for _, n in late.token_counts()] == [50, 35, 20, 11]
    zoo.wrap(backbone("plain", img_size=28), "tome", {"name": "keep_rate", "rate": 0.5})
    with pytest.raises(UnreachableBudget, match="at most"):
        zoo.wrap(m, "tome", {"name": "keep_rate", "rate": 0.2})
    with pytest.raises(UnreachableBudget):
        zoo.wrap(m, "topk", {"name": "constant_r", "r": 64})
    with pytest.raises(ZooError, match=r"blocks must be in 0..3"):
        zoo.wrap(m, "topk", {"name": "keep_rate", "blocks": [4]})
    with pytest.raises(ZooError, match="2 counts but the model 4"):
        zoo.wrap(m, "topk", {"name": "per_block", "keep": [5, 3]})


def test_target_gmacs_says_what_is_reachable() -> None:
    m = backbone("plain")
    with pytest.raises(UnreachableBudget, match=r"topk: .*nearest that can be reached is 0\.0"):
        zoo.wrap(m, "topk", {"name": "target_gmacs", "gmacs": 1e-6})
    with pytest.raises(UnreachableBudget, match="above the dense model"):
        zoo.wrap(m, "topk", {"name": "target_gmacs", "gmacs": 5.0})
    exact = zoo.wrap(m, "topk", {"name": "target_gmacs", "fraction": 1.0})
    assert exact.token_counts() == [(65, 65)] * 4
    other = zoo.wrap(m, "topk", {"name": "target_gmacs", "family": "constant_r"})
    assert other.schedule.name == "constant_r"


def test_published_counts_of_the_fixed_patterns() -> None:
    """Haurum et al., 14 x 14 patches: the ring whose count is closest to the budget."""
    table = {
        "l1": [(172, 156, 136), (136, 92, 68), (92, 40, 24), (40, 12, 4)],
        "l2": [(176, 156, 140), (140, 96, 68), (96, 52, 24), (52, 12, 4)],
        "linf": [(196, 144, 144), (144, 100, 64), (100, 36, 16), (36, 16, 4)],
    }
    for pattern, rows in table.items():
        rings = ring_counts(pattern, (14, 14))
        for rate, expected in zip((0.9, 0.7, 0.5, 0.25), rows, strict=True):
            asked = [int(196 * rate ** (s + 1)) for s in range(3)]
            assert tuple(min(rings, key=lambda c: abs(c - a)) for a in asked) == expected


def test_a_target_out_of_reach_gives_the_nearest_if_asked() -> None:
    target = {"name": "target_gmacs", "fraction": 0.05}
    with pytest.raises(UnreachableBudget) as error:
        zoo.wrap(backbone("plain"), "tome", target)
    model = zoo.wrap(backbone("plain"), "tome", {**target, "nearest": True})
    assert f"{zoo.profile(model).gmacs:.4f}" in str(error.value)


def test_nominal_counts_are_not_made_up_for() -> None:
    # 81 tokens at a rate of 0.25: 20, 5 and 1 are asked for, but half of the tokens is the most
    # that merges at once.
    args = {"rate": 0.25, "blocks": [1, 2, 3], "strict": False}
    vit = backbone("plain", img_size=36)
    left = [
        zoo.wrap(vit, "tome", KeepRate(**args, nominal_r=n)).token_counts()[-3:]
        for n in (True, False)
    ]
    assert [after - 1 for _, after in left[0]] == [41, 26, 22]
    assert [after - 1 for _, after in left[1]] == [41, 21, 11]
    with pytest.raises(ZooError, match="goes with of='initial'"):
        KeepRate(0.5, of="current", nominal_r=True)
    # Where nothing is out of reach, both are the same.
    plain, nominal = (
        zoo.wrap(vit, "topk", KeepRate(0.7, nominal_r=n)).token_counts() for n in (False, True)
    )
    assert plain == nominal
