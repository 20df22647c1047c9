"""Budgets in time, on a machine whose clock is a formula."""

from __future__ import annotations

import pytest
import torch

import zoo
from reduction import UnreachableBudget, ZooError, create_schedule, list_schedules
from zoo.budget import time as latency
from zoo.cost.analytic import block_costs

BACKBONE = "vit_tiny_patch16_224"


@pytest.fixture
def clock(monkeypatch):
    """Seconds per call: linear layers, attention, a fee per block that reduces, and the rest."""
    calls = []

    def run(models, images, rounds, threads=None, engine=None):
        def seconds(model):
            costs = block_costs(model.anatomy, model.schedule)
            macs = sum(c.linear + c.mlp + 2 * c.attention + 3 * c.reducer for c in costs)
            fee = sum(c.tokens_in != c.tokens_out for c in costs) * 2e-4
            return len(images) * (1e-11 * macs + fee + 1e-3)

        calls.append([seconds(m) for m in models])
        return [[t] * rounds for t in calls[-1]], 2

    monkeypatch.setattr(latency, "interleaved", run)
    return calls


@pytest.mark.parametrize("method", ["tome", "topk", "token_pooling"])
@pytest.mark.parametrize("speedup", [1.25, 1.6])
def test_a_speedup_is_met_by_the_weakest_reduction(clock, method, speedup) -> None:
    target = {"name": "target_speedup", "speedup": speedup, "batch": 4, "tolerance": 0.02}
    model = zoo.create_model(BACKBONE, method, target)
    reduced, dense = clock[-1]
    measured = model.target.measured
    assert dense / reduced == pytest.approx(speedup, rel=0.03)
    assert measured.ms_dense / measured.ms == pytest.approx(speedup, rel=0.03)
    assert f"{measured.ms:.2f} ms" in str(measured) and "batch 4" in str(measured)
    assert 5 < len(clock) <= 9


def test_milliseconds_are_of_the_whole_batch(clock) -> None:
    make = lambda ms, batch: zoo.create_model(  # noqa: E731
        BACKBONE, "tome", {"name": "target_ms", "ms": ms, "batch": batch}
    )
    one, four = make(10.0, 1), make(40.0, 4)
    assert one.target.measured.ms == pytest.approx(10.0, rel=0.03)
    assert four.target.measured.ms == pytest.approx(40.0, rel=0.03)
    assert one.token_counts() == four.token_counts()


def test_what_needs_no_reduction_is_left_alone(clock) -> None:
    model = zoo.create_model(BACKBONE, "topk", {"name": "target_ms", "ms": 1e3})
    assert len({n for pair in model.token_counts() for n in pair}) == 1


def test_out_of_reach_says_what_was_reached(clock) -> None:
    with pytest.raises(UnreachableBudget, match=r"target of 1 ms is below .*'tome'.* measured"):
        zoo.create_model(BACKBONE, "tome", {"name": "target_ms", "ms": 1.0})


def test_loading_measures_nothing(clock, tmp_path) -> None:
    from zoo.checkpoint import load, save_pretrained

    target = {"name": "target_speedup", "speedup": 1.4}
    model = zoo.create_model(BACKBONE, "tome", target)
    number = len(clock)
    save_pretrained(model, tmp_path)
    again = load(tmp_path)
    assert len(clock) == number
    assert again.token_counts() == model.token_counts()
    assert again.recipe["schedule"]["name"] == "constant_r"


def test_the_fit_has_no_negative_weights() -> None:
    predict = latency._fit([((1.0, 0.0, 1.0), 1.0), ((0.5, 1.0, 1.0), 0.4), ((0.2, 0.0, 1.0), 0.2)])
    for i in range(3):
        assert predict(tuple(float(i == j) for j in range(3))) >= 0
    exact = latency._fit([((a, 1.0), 2 * a + 3.0) for a in (0.1, 0.5, 0.9)])
    assert exact((0.7, 1.0)) == pytest.approx(4.4, abs=1e-3)


@pytest.mark.parametrize(
    "spec",
    [
        {"name": "target_ms", "ms": 0},
        {"name": "target_ms", "ms": 5.0, "rounds": 0},
        {"name": "target_ms", "ms": 5.0, "tolerance": 1.0},
        {"name": "target_speedup", "speedup": 0.9},
        {"name": "target_speedup", "batch": 2.5},
        {"name": "target_speedup", "family": "nothing"},
    ],
)
def test_bad_numbers_are_refused(spec) -> None:
    with pytest.raises(ZooError):
        create_schedule(spec)


def test_they_are_schedules_like_the_others() -> None:
    assert {"target_ms", "target_speedup"} <= set(list_schedules())
    with pytest.raises(ZooError, match="solved when a model is built"):
        create_schedule({"name": "target_ms", "ms": 5.0}).budget(0, 12, 196, 196)


def test_the_real_clock_takes_turns() -> None:
    seen = []

    class Probe(torch.nn.Module):
        def forward(self, x):
            seen.append(self)
            return x

    models = [Probe(), Probe()]
    times, threads = latency.interleaved(models, torch.zeros(1, 3, 8, 8), rounds=3)
    assert [len(t) for t in times] == [3, 3] and threads == torch.get_num_threads()
    # Forwards and backwards, so that neither always comes first.
    assert seen[-6:] == [models[i] for i in (0, 1, 1, 0, 0, 1)]
