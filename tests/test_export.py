"""Recorded models answer what the model answers: torch.jit.trace and ONNX, or they are refused."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zoo
from reduction.functional import portable
from tests.cases import CORE, METHODS, Row, images, model, refused
from tests.covering import parts
from zoo.errors import ZooError
from zoo.export.agreement import compare

FIRST = list({row.name: row for row in reversed(METHODS)}.values())[::-1]
#: What differs in how tokens leave: pairs, a pattern, own attention with padding, parked tokens.
FEW = [row for row in FIRST if row.name in ("tome", "topk", "ats", "evovit")]


def batches(size: int = 32) -> list[Tensor]:
    """Others than the one that is recorded, in number and content."""
    return [images(2, size, seed=3), images(5, size, seed=7), images(1, size, seed=9) * 3]


def gap(a: Any, b: Any, x: Tensor) -> float:
    with torch.no_grad():
        return float((a(x) - b(x)).abs().max())


# --------------------------------------------------------------------------------------- tracing


def check_trace(row: Row, name: str) -> None:
    m = model(row, name)
    with torch.no_grad():
        traced = torch.jit.trace(m, images(2), check_trace=False)
    assert max(gap(traced, m, x) for x in batches()) < 1e-4


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("row", parts(FIRST, 2, of=6))
def test_tracing(row: Row) -> None:
    check_trace(row, "plain")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [n for n in CORE if n != "plain"])
def test_tracing_on_every_family(name: str) -> None:
    for row in METHODS:
        if not refused(row, name):
            check_trace(row, name)


@pytest.mark.filterwarnings("ignore")
def test_a_trace_takes_no_other_size() -> None:
    m = model(METHODS[0], dynamic_img_size=True)
    with torch.no_grad():
        traced = torch.jit.trace(m, images(2))
        for size in (48, 64):
            assert m(images(4, size)).shape == (4, 10)
            with pytest.raises(RuntimeError, match=r"expanded size of the tensor \(32\)"):
                traced(images(4, size))


@pytest.mark.filterwarnings("ignore")
def test_what_a_trace_of_features_holds() -> None:
    class Embedding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model(METHODS[0], "gap")

        def forward(self, x: Tensor) -> Tensor:
            return self.model.forward_head(self.model.forward_features(x))

    m = Embedding()
    with torch.no_grad():
        traced = torch.jit.trace(m, images(2))
        exported = torch.export.export(m, (images(2),)).module()
    assert max(gap(traced, m.model, x) for x in batches()) < 1e-4
    assert gap(exported, m.model, batches()[0]) < 1e-4


# ------------------------------------------------------------------------------------------ ONNX


def check_onnx(m: Any, path: Path, x: Tensor, others: list[Tensor]) -> None:
    """Export with a batch of any size, and run elsewhere."""
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    batch = torch.export.Dim("batch")
    logging.disable(logging.WARNING)
    try:
        with torch.no_grad():
            shapes = ({0: batch},)
            torch.onnx.export(m, (x,), path, dynamo=True, verbose=False, dynamic_shapes=shapes)
    finally:
        logging.disable(logging.NOTSET)
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    [name] = [node.name for node in session.get_inputs()]
    for other in others:
        [found] = session.run(None, {name: other.numpy()})
        assert found.shape == (len(other), m.num_classes)
        assert gap(m, lambda _, found=found: torch.from_numpy(found), other) < 1e-4


def check_openvino(m: Any, path: Path, others: list[Tensor]) -> None:
    """Convert what `check_onnx` wrote, and run it on some images, and on more than tokens.

    Of so many a tie or two is decided by rounding, by an energy above all.
    """
    openvino = pytest.importorskip("openvino")
    config = {"INFERENCE_PRECISION_HINT": "f32"}
    graph = openvino.Core().compile_model(openvino.convert_model(path), "CPU", config)
    for other in [*others, torch.cat([images(7, seed=s) for s in range(11)])]:
        with torch.no_grad():
            known = compare(m, [(other, m(other), graph([other.numpy()])[0])], 1e-4)
        assert known.agrees and known.undecided <= 2, known


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("row", FEW, ids=lambda r: r.id)
def test_onnx(row: Row, tmp_path: Path) -> None:
    m = model(row, depth=2)
    assert m.token_counts()[-1][1] < 65 or row.restores
    check_onnx(m, tmp_path / "model.onnx", images(2), batches())
    check_openvino(m, tmp_path / "model.onnx", batches())


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8, torch.int64])
def test_an_exported_order_keeps_equal_entries_in_place(
    descending: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No sort is stable where nobody asks, from some length on."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randint(0, 3, (3, 70, 200), generator=draw).to(dtype)
    if dtype.is_floating_point:
        x[0, 0, ::3], x[1, 2, ::7] = -torch.inf, torch.inf
    for dim in (0, 1, 2):
        expected = x.argsort(dim=dim, descending=descending, stable=True)
        with monkeypatch.context() as patch:
            patch.setattr(portable, "exporting", lambda: True)
            assert torch.equal(portable.stable_order(x, dim, descending), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_exported_maximum_is_the_first_of_equal_ones(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randint(-3, 3, (4, 5, 700), generator=torch.Generator().manual_seed(0)).to(dtype)
    x[0, 0], x[1, 1], x[2, 2] = -torch.inf, 0.0, torch.nan
    best, index = portable.best_of(x)
    monkeypatch.setattr(portable, "exporting", lambda: True)
    same, place = portable.best_of(x)
    numbers = torch.ones(4, 5, dtype=torch.bool)
    numbers[2, 2] = False
    assert torch.equal(same[numbers], best[numbers]) and torch.equal(place[numbers], index[numbers])
    assert place.dtype == torch.int64 and 0 <= int(place[2, 2]) < 700


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("row", FIRST, ids=lambda r: r.id)
def test_what_was_exported_with_gradients_on_can_be_lowered(row: Row) -> None:
    """As most people export: in evaluation mode, and without `torch.no_grad()`."""
    # In double precision no choice between two tokens depends on how an exporter adds up.
    m, x = model(row).double(), images(2).double()
    lowered = torch.export.export(m, (x,)).run_decompositions().module()
    assert max(gap(lowered, m, y) for y in (x, batches()[0].double())) < 1e-6


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("row", METHODS, ids=lambda r: r.id)
def test_onnx_of_every_method(row: Row, tmp_path: Path) -> None:
    m = model(row, depth=2)
    check_onnx(m, tmp_path / "model.onnx", images(2), batches())
    check_openvino(m, tmp_path / "model.onnx", batches())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [n for n in CORE if n != "plain"])
def test_onnx_of_every_family(name: str, tmp_path: Path) -> None:
    check_onnx(model(METHODS[0], name, depth=2), tmp_path / "m.onnx", images(2), batches())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["tome", "pitome", "diffrate", "token_pooling"])
def test_onnx_of_a_trained_model(name: str, tmp_path: Path) -> None:
    digits = torch.rand(9, 1, 16, 16)
    m = zoo.load("vit_digits", reducer=name).eval()
    check_onnx(m, tmp_path / "model.onnx", digits[:2], [digits, digits[3:5]])


@pytest.mark.filterwarnings("ignore")
def test_the_old_exporter_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    path = tmp_path / "model.onnx"
    for row in FEW:
        with pytest.raises(ZooError, match="dynamo=False writes models .* use dynamo=True"):
            torch.onnx.export(model(row), (images(2),), path, dynamo=False, verbose=False)
    assert not path.exists()
