"""What runs a model is chosen, measured beside dense in the same engine, and named in the row."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from torch import nn

import zoo
from reduction import create_schedule
from tests.cases import backbone
from zoo.budget import time as budget
from zoo.errors import ZooError
from zoo.export import formats
from zoo.measure import engines
from zoo.measure.describe import dense_of
from zoo.measure.engines import Engine, Graphs, check_engine
from zoo.measure.machine import in_words, machine, read
from zoo.measure.throughput import interleaved, measure_each
from zoo.report.readings import setting, speeds
from zoo.run.evaluate import evaluate_each
from zoo.run.messages import config_folder

CPU = torch.device("cpu")


def small() -> zoo.ReducedViT:
    torch.manual_seed(0)
    return zoo.wrap(backbone("plain", depth=2), "tome", {"name": "constant_r", "r": 8}).eval()


class Sleeper(nn.Module):
    """Takes its time, and notes when it was called."""

    def __init__(self, calls: list[str], name: str) -> None:
        super().__init__()
        self.calls, self.name = calls, name

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.append(self.name)
        return x.flatten(1)


def evaluated(*words: str) -> list[dict]:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        rows = evaluate_each(compose("eval", ["task=throughput", *words]))
    GlobalHydra.instance().clear()
    return rows


QUICK = ("throughput.rounds=1", "throughput.min_time=0.001", "throughput.batch=2")


def test_all_engines_take_turns_in_one_process() -> None:
    calls: list[str] = []
    models = {e: [Sleeper(calls, f"{e}{i}") for i in range(3)] for e in "ab"}
    found = measure_each(
        {Engine("torch", CPU): m for m in models.values()},
        input_size=(1, 2, 2), batch=2, rounds=2, min_time=1e-9,
    )  # fmt: skip
    assert calls[-12:] == ["a0", "a1", "a2", "b0", "b1", "b2", "b2", "b1", "b0", "a2", "a1", "a0"]
    for one in found.values():
        assert one.imgs_per_s and one.imgs_per_s_dense and one.imgs_per_s_timm
        assert one.cpu_ms is not None and one.cpu_ms >= 0


def test_one_model_in_two_places_runs_once() -> None:
    calls: list[str] = []
    model, dense = Sleeper(calls, "model"), Sleeper(calls, "dense")
    [found] = measure_each(
        {Engine("torch", CPU): [model, dense, dense]},
        input_size=(1, 2, 2), batch=1, rounds=3, min_time=1e-9,
    ).values()  # fmt: skip
    assert found.imgs_per_s_dense == found.imgs_per_s_timm
    assert calls[-2:] == ["model", "dense"] and calls.count("model") == calls.count("dense")


def test_an_engine_has_a_row_with_dense_beside_it(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    first, second = evaluated(
        "weights=vit_digits", "reducer=topk", "throughput.engine=[torch,onnxruntime]", *QUICK
    )
    assert (first["engine"], second["engine"]) == ("torch", "onnxruntime")
    for row in (first, second):
        assert row["method"] == "topk" and row["gmacs"] == first["gmacs"]
        assert row["imgs_per_s_dense"] > 0 and row["imgs_per_s_timm"] > 0
        assert row["ms"] > 0 and row["cpu_ms"] > 0 and row["threads"] >= 1
        assert row["machine"]["name"] and isinstance(row["machine"]["isa"], list)
    assert set(second["kernels"]) == {"onnxruntime"} and second["compile"] is False
    assert setting(second) == setting(first).replace("float32", "float32, onnxruntime")
    [speed] = speeds(second).values()
    assert speed.over_timm == pytest.approx(second["imgs_per_s"] / second["imgs_per_s_timm"])


def test_rows_without_engine_are_as_before() -> None:
    [row] = evaluated("weights=vit_digits", "reducer=topk", *QUICK)
    assert row["engine"] == "torch" and row["imgs_per_s_timm"] == row["imgs_per_s_dense"]
    # With an option the dense model is no longer timm's own, which nobody asked to be measured.
    [row] = evaluated(
        "weights=vit_digits", "reducer=topk", "runtime.last_block=class_token", *QUICK
    )
    assert row["imgs_per_s_dense"] > 0 and row["imgs_per_s_timm"] is None


def test_same_kernels_are_those_of_the_reduced_blocks() -> None:
    model = small()
    assert dense_of(model) is model.backbone
    alike = dense_of(model, same_kernels=True)
    assert alike.runtime.own_kernels and alike.backbone is model.backbone and not alike.reducer


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["throughput.engine=[]"], "throughput.engine is empty"),
        (["throughput.engine=torch", "compile=true"], "leave out compile"),
        (["throughput.engine=[torch,tensorrt]"], "expected one of torch, compile, onnxruntime"),
        (["throughput.engine=onnxruntime", "dtype=bfloat16"], "knows no autocast"),
        (["throughput.engine=onnxruntime", "weights_dtype=bfloat16"], "no bfloat16 products"),
    ],
)
def test_wrong_wishes_are_one_line(words: list[str], says: str) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    with pytest.raises(ZooError) as refused:
        evaluated("weights=vit_digits", "reducer=topk", *QUICK, *words)
    assert says in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(("engine", "extra"), [("onnxruntime", "export"), ("openvino", "openvino")])
def test_a_runtime_that_is_not_installed(
    engine: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing(name: str) -> None:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(formats.importlib, "import_module", nothing)
    with pytest.raises(ZooError, match=rf"{engine} is needed .* pip install 'tokenzoo\[{extra}\]'"):
        check_engine(engine, CPU, torch.float32)
    with pytest.raises(ZooError, match=r"runs on the CPU, not on cuda.*type device=cpu"):
        check_engine(engine, torch.device("cuda"), torch.float32)


def test_a_model_that_answers_otherwise_is_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    images = torch.randn(2, 3, 32, 32)
    wrong = images.flatten(1)[:, :10] + 5
    monkeypatch.setattr(Graphs, "of", lambda self, model: (Path("m/model.onnx"), images, wrong))
    monkeypatch.setattr("zoo.export.engines.open_engine", lambda *_: lambda x: 0 * wrong.numpy())
    with pytest.raises(ZooError, match=r"differs from torch by .*; its speed would be that of"):
        Engine("onnxruntime", CPU).start(small())


def test_what_cannot_be_exported_says_which_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")

    def refuse(self: Graphs, model: nn.Module) -> None:
        raise ZooError("export.format=onnx cannot capture this model: it looks at numbers")

    monkeypatch.setattr(Graphs, "of", refuse)
    with pytest.raises(ZooError, match=r"throughput.engine=onnxruntime: .*; leave onnxruntime out"):
        Engine("onnxruntime", CPU).start(small())


def test_compiled_models_have_one_graph_per_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(engines, "_many_compiled", lambda: None)
    monkeypatch.setattr(torch, "compile", lambda m, **how: seen.append(how) or m)
    model, engine = small(), Engine("compile", CPU)
    times, _ = interleaved([model, model], torch.randn(1, 3, 32, 32), 1, engine=engine)
    assert seen == [{"dynamic": False}] and len(times) == 2  # compiled once, however often timed


@pytest.mark.slow
def test_every_engine_answers_as_torch() -> None:
    for package in ("onnxscript", "onnxruntime", "openvino"):
        pytest.importorskip(package)
    model, images = small(), torch.randn(3, 3, 32, 32)
    graphs = Graphs()
    with torch.inference_mode():
        wanted = model(images)
        for name in engines.ENGINES:
            found = Engine(name, CPU, graphs=graphs).start(model)(images)()
            assert (torch.as_tensor(found) - wanted).abs().max() < 1e-4, name
        half = copy.deepcopy(model).bfloat16()
        found = Engine("openvino", CPU).start(half)(images)()
        assert (torch.as_tensor(found) - wanted).abs().max() < 0.3


# ------------------------------------------------------------------------------ budgets in time


def test_a_budget_in_time_is_measured_in_its_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def run(models, images, rounds, threads=None, engine=None):
        seen.append(engine.name)
        return [[2.0 / (1 + models[0].schedule.config()["r"])] * rounds, [1.0] * rounds], 1

    monkeypatch.setattr(budget, "interleaved", run)
    target = {"name": "target_speedup", "speedup": 2.0, "engine": "compile"}
    model = zoo.wrap(backbone("plain"), "tome", target)
    assert set(seen) == {"compile"} and "in compile" in str(model.target.measured)
    with pytest.raises(ZooError, match="engine must be one of"):
        create_schedule({"name": "target_ms", "ms": 5.0, "engine": "tensorrt"})


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_a_budget_in_time_is_found_by_a_real_engine(engine: str) -> None:
    """Two shares of the time, far apart: the smaller one leaves fewer tokens."""
    pytest.importorskip(engine)
    tokens = []
    for speedup in (1.05, 1.7):
        torch.manual_seed(0)
        plain = backbone("plain", depth=4, img_size=160)
        target = {"name": "target_speedup", "speedup": speedup, "engine": engine, "tolerance": 0.3}
        model = zoo.wrap(plain, "topk", target)
        assert f"in {engine}" in str(model.target.measured)
        assert model.target.measured.engine == engine
        tokens.append(model.token_counts()[-1][1])
    assert tokens[1] < tokens[0]


# ------------------------------------------------------------------------------------ machine


def test_a_processor_is_read_as_linux_spells_it() -> None:
    text = (
        "processor : 0\ncpu family : 6\nmodel : 143\nmodel name : Some Xeon\n"
        "flags : fpu avx2 avx512f avx512_bf16 amx_tile amx_bf16\n\nprocessor : 1\nmodel name : B\n"
    )
    found = read(text)
    assert found["name"] == "Some Xeon" and found["isa"][:2] == ["amx_tile", "amx_bf16"]
    assert in_words(found) == (
        "Some Xeon (family 6, model 143): amx_tile, amx_bf16, avx512_bf16, avx512f"
    )
    assert "no AMX" in in_words(read("model name : Old\nflags : avx2\n"))
    assert machine()["name"]
