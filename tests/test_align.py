"""Aligned counts: lengths behind reductions are multiples, near to what was asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hypothesis import given, settings
from hypothesis import strategies as st

import reduction
import zoo
from reduction import create_schedule
from reduction.functional import kernels
from tests.cases import METHODS, backbone, images
from zoo import checkpoint
from zoo.adapters.hollow import hollow
from zoo.budget import align as measuring
from zoo.cost.counters import torch_gmacs
from zoo.errors import UnreachableBudget, ZooError
from zoo.measure.describe import describe
from zoo.model.anatomy import Anatomy
from zoo.model.plan import make_plan
from zoo.run.build import build_model
from zoo.run.messages import config_folder

ROWS = {row.name: row for row in METHODS}


def reducing(model: zoo.ReducedViT) -> list[tuple[int, int]]:
    plans = model.plan()
    return [(p.entering, p.leaving) for p in plans if p.step is not None and p.leaving < p.entering]


@pytest.mark.parametrize("align", [8, 16])
@pytest.mark.parametrize("name", [n for n in sorted(ROWS) if not ROWS[n].own_counts])
def test_a_method_leaves_multiples_and_runs_as_planned(name: str, align: int) -> None:
    row = ROWS[name]
    schedule = {**dict(row.schedule), "align": align}
    torch.manual_seed(0)
    model = zoo.wrap(backbone("plain"), row.reducer(), schedule).eval()
    for entering, leaving in reducing(model):
        assert leaving % align == 0 and leaving < entering
    with torch.no_grad():
        logits, info = model(images(2), return_info=True)
    assert torch.isfinite(logits).all()
    adaptive = any(a != b for a, b in zip(info.tokens, model.token_counts(), strict=True))
    if not adaptive:
        assert zoo.profile(model).gmacs == pytest.approx(torch_gmacs(model, images(2)), rel=1e-5)


@pytest.mark.parametrize("name", [n for n in sorted(ROWS) if ROWS[n].own_counts])
def test_a_method_with_counts_of_its_own_says_so(name: str) -> None:
    row = ROWS[name]
    with pytest.raises(UnreachableBudget, match="align=16 cannot be met.*use align=1"):
        model = zoo.wrap(backbone("plain"), row.reducer(), {**dict(row.schedule), "align": 16})
        model.plan()


def test_the_counts_of_deit_small() -> None:
    with hollow():
        model = zoo.create_model(
            "deit_small_patch16_224",
            reducer="tome",
            schedule={"name": "constant_r", "r": 13, "align": 32},
        )
    # 184 171 158 145 132 119 106 93 80 67 54 41 are asked for; 64 tokens cannot be halved to 32.
    leaving = [after for _, after in model.token_counts()]
    assert leaving == [192, 160, 160, 160, 128, 128, 96, 96, 96, 64, 64, 64]


@settings(max_examples=60, deadline=None)
@given(
    align=st.sampled_from([1, 2, 8, 16, 32]),
    r=st.integers(0, 20),
    n=st.integers(4, 200),
    name=st.sampled_from(["tome", "topk", "evit"]),
)
def test_rounded_counts_stay_near_those_asked_for(align: int, r: int, n: int, name: str) -> None:
    m = backbone("plain")
    anatomy = Anatomy(m, reduction.create(name), [])
    args = {"name": "constant_r", "r": r, "strict": False}
    asked = make_plan(anatomy, create_schedule(args), n=n)
    rounded = make_plan(anatomy, create_schedule({**args, "align": align}), n=n)
    if align == 1:
        assert asked == rounded
        return
    for want, got in zip(asked, rounded, strict=True):
        if got.step is not None:
            assert got.leaving % align == 0 and 1 <= got.leaving < got.entering
        assert got.leaving >= want.leaving - (align + 1) // 2 or got.leaving <= 2 * align


def test_a_target_is_met_with_alignment() -> None:
    for name in ("tome", "evit", "pitome"):
        schedule = {"name": "target_gmacs", "fraction": 0.6, "align": 8}
        model = zoo.wrap(backbone("plain"), name, schedule)
        assert model.schedule is not None and model.schedule.align == 8
        assert zoo.profile(model).gmacs <= 0.6 * zoo.profile(backbone("plain")).gmacs
        assert reducing(model) and all(after % 8 == 0 for _, after in reducing(model))


def test_pruning_keeps_its_share_of_what_leaves() -> None:
    keep = [60, 50, 40, 30]
    prune = [62, 55, 45, 35]  # half of what leaves, each time
    schedule = {"name": "per_block", "keep": keep, "prune": prune, "align": 16}
    model = zoo.wrap(backbone("plain"), "diffrate", schedule)
    for plan in model.plan():
        if plan.step is not None:
            n, budget = plan.entering - model.prefix, plan.step.budget
            assert budget.keep <= budget.prune <= n
            assert abs((n - budget.prune) - (n - budget.keep) / 2) <= 0.2 * (n - budget.keep) + 1


def test_a_pattern_of_its_own_cannot_be_aligned() -> None:
    with pytest.raises(UnreachableBudget, match="use align=1"):
        zoo.wrap(backbone("plain"), "heuristic", {"name": "keep_rate", "align": 16})
    target = {"name": "target_gmacs", "fraction": 0.6, "align": 16}
    with pytest.raises(UnreachableBudget, match="^heuristic: align=16") as told:
        zoo.wrap(backbone("plain"), "heuristic", target)
    assert str(told.value).count("heuristic") == 1
    for wrong in (0, -1, "x", True, None, 1.5, 10**9):
        with pytest.raises(ZooError, match="align must be") as refused:
            create_schedule({"name": "keep_rate", "align": wrong})
        assert "\n" not in str(refused.value)


def test_auto_is_what_the_kernel_likes(monkeypatch: pytest.MonkeyPatch) -> None:
    speeds = {1: 3.0, 16: 1.0, 32: 2.0}

    def clock(qkv, device):
        length = qkv[0].shape[2]
        align = 32 if length % 32 == 0 else 16 if length % 16 == 0 else 1
        return speeds[align] * length**2

    monkeypatch.setattr(measuring, "_time", clock)
    for fastest, expected in ((16, 16), (32, 32), (1, 1)):
        measuring.best.cache_clear()
        speeds.update({1: 3.0, 16: 2.0, 32: 2.5} | {fastest: 1.0})
        model = zoo.wrap(backbone("plain"), "tome", {"name": "constant_r", "r": 5, "align": "auto"})
        assert model.schedule.align == expected
    measuring.best.cache_clear()


def test_a_measurement_leaves_no_trace_and_needs_a_clock() -> None:
    measuring.best.cache_clear()
    schedule = {"name": "constant_r", "r": 5, "align": "auto"}
    m = backbone("plain")
    state = torch.get_rng_state()
    zoo.wrap(m, "tome", schedule)
    assert torch.equal(torch.get_rng_state(), state)
    kernels.set_deterministic(True)
    try:
        with pytest.raises(ZooError, match="goes without a clock"):
            zoo.wrap(m, "tome", schedule)
    finally:
        kernels.set_deterministic(False)


def test_alignment_is_saved_and_stands_in_the_row(tmp_path: Path) -> None:
    schedule = {"name": "constant_r", "r": 5, "align": 8}
    model = zoo.create_model("test_vit", reducer="tome", schedule=schedule).eval()
    checkpoint.save_pretrained(model, tmp_path / "m")
    again = zoo.load(str(tmp_path / "m"))
    assert again.schedule == model.schedule and again.schedule.align == 8
    assert again.token_counts() == model.token_counts()
    assert describe(model)["schedule"]["align"] == 8
    plain = zoo.create_model("test_vit", reducer="tome", schedule={"name": "constant_r", "r": 5})
    assert "align" not in plain.schedule.config()


def test_every_schedule_has_the_option() -> None:
    for path in Path("configs/schedule").rglob("*.yaml"):
        assert yaml.safe_load(path.read_text())["align"] == 1, path
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        words = ["backbone=test_vit", "reducer=tome", "schedule.r=5"]
        model = build_model(compose("eval", [*words, "schedule.align=8"]))
        alone = compose("eval", [*words[:2], "schedule.align=8"])
        with pytest.raises(ZooError, match="needs a schedule"):
            build_model(alone)
    GlobalHydra.instance().clear()
    assert model.schedule.align == 8
