"""Weights and images cast once: what runs, what a row says, and how far logits move."""

from __future__ import annotations

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

import zoo
from tests.cases import METHODS, backbone, images
from zoo.errors import ZooError
from zoo.measure.fidelity import compare_answers
from zoo.measure.throughput import measure
from zoo.report.identity import precision
from zoo.run.build import build_model
from zoo.run.evaluate import evaluate
from zoo.run.messages import config_folder

FIRST = list({row.name: row for row in reversed(METHODS)}.values())[::-1]


def configured(*words: str):
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        cfg = compose("eval", list(words))
    GlobalHydra.instance().clear()
    return cfg


@pytest.mark.parametrize("row", FIRST, ids=lambda r: r.id)
def test_every_method_runs_with_bfloat16_weights(row) -> None:
    torch.manual_seed(0)
    model = zoo.wrap(backbone("plain"), row.reducer(), dict(row.schedule)).eval().bfloat16()
    x = images(2).bfloat16()
    with torch.no_grad():
        logits, info = model(x, return_info=True)
    assert logits.dtype == torch.bfloat16 and torch.isfinite(logits).all()
    assert info.size.dtype == torch.float32  # 257 patches are more than bfloat16 can count


@pytest.mark.parametrize("name", ["tome", "topk", "evit", "pitome", "diffrate"])
def test_logits_move_by_rounding_where_nothing_is_near_a_tie(name: str) -> None:
    torch.manual_seed(0)
    m = backbone("plain")
    schedule = {"name": "constant_r", "r": 1}
    with torch.no_grad():
        exact = zoo.wrap(m, name, schedule).eval()(images(4))
        half = zoo.wrap(m.bfloat16(), name, schedule).eval()(images(4).bfloat16()).float()
    assert (half - exact).norm() / exact.norm() < 0.1


def test_a_row_says_which_type_weights_had() -> None:
    words = ["weights=vit_digits", "reducer=tome", "schedule.r=4", "limit=16", "device=cpu"]
    row = evaluate(configured(*words, "task=[accuracy,fidelity]", "weights_dtype=bfloat16"))
    assert row["weights_dtype"] == "bfloat16" and row["dtype"] == "float32"
    assert precision(row) == "bfloat16 weights" and row["fidelity"]["agreement"] > 90
    plain = evaluate(configured(*words, "task=accuracy"))
    assert plain["weights_dtype"] is None and precision(plain) == "float32"
    assert abs(plain["top1"] - row["top1"]) <= 100 / 16


def test_models_are_cast_after_their_weights_are_read() -> None:
    words = ["weights=vit_digits", "reducer=tome", "schedule.r=4", "weights_dtype=bfloat16"]
    model = build_model(configured(*words))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    asked = build_model(configured(*words[:2], "schedule=constant_r", "schedule.align=auto"))
    assert asked.schedule.align in (1, 16, 32)
    for wrong in ("float64", "int8", "yes"):
        with pytest.raises(ZooError, match="weights_dtype"):
            build_model(configured(*words[:3], f"weights_dtype={wrong}"))


def test_every_measure_takes_such_a_model() -> None:
    model = zoo.wrap(backbone("plain"), "tome", {"name": "constant_r", "r": 4}).eval().bfloat16()
    dense = model.unwrap()
    size = model.tower.input_size(dense)
    assert measure(model, dense, input_size=size, batch=2, rounds=1, min_time=1e-4).ms > 0
    found = compare_answers(model, dense, [(images(2), images(2))])
    assert found["n_images"] == 2
    adaptive = zoo.wrap(backbone("plain"), "ats").eval().bfloat16()
    assert zoo.profile(adaptive, images=images(2)).sample.images == 2
