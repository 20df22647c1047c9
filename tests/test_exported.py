"""Exported folders answer as torch does, need nothing of this package, or are refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from PIL import Image

import zoo
from tests import hf_cases
from tests.cases import backbone
from tests.covering import every
from zoo.checkpoint import save_pretrained
from zoo.data.checks import data_config
from zoo.data.transforms import eval_transform
from zoo.errors import BadCheckpoint, ZooError
from zoo.export import Bundle, export_model, open_engine
from zoo.export.formats import to_onnx
from zoo.report.words import summary_line
from zoo.run.evaluate import evaluate
from zoo.run.messages import config_folder

SCRIPT = Path(zoo.__file__).parent / "assets" / "run_exported.py.txt"


def small() -> zoo.ReducedViT:
    torch.manual_seed(0)
    return zoo.wrap(backbone("plain", depth=2), "tome", {"name": "constant_r", "r": 8}).eval()


def answers(model: zoo.ReducedViT, images: torch.Tensor) -> np.ndarray:
    with torch.no_grad():
        return model(images).float().numpy()


@pytest.mark.parametrize("kind", every(["onnx", "torch", "openvino"], 3))
def test_a_folder_answers_as_torch(kind: str, tmp_path: Path) -> None:
    pytest.importorskip({"onnx": "onnxscript", "openvino": "openvino"}.get(kind, "torch"))
    model, images = small(), torch.randn(5, 3, 32, 32)
    found = export_model(model, tmp_path / "m", kind, images=[images[:2], images[2:]])
    assert found.max_error < 1e-4 and found.agreement == 100 and found.n_real == 5
    run = open_engine(found.folder, kind)
    for n in (1, 4, 5):
        assert np.abs(run(images[:n].numpy()) - answers(model, images[:n])).max() < 1e-4
    kept = {p.name for p in (tmp_path / "m").iterdir()}
    assert kept == {*found.files, "preprocess.json", "recipe.json", "run.py"}
    recipe = json.loads((tmp_path / "m" / "recipe.json").read_text())
    assert recipe["token_counts"] == [list(pair) for pair in model.token_counts()]


def test_a_tower_built_by_hand_is_fed_as_its_library_does(tmp_path: Path) -> None:
    pytest.importorskip("transformers", minversion="5.0")
    wrapped = zoo.wrap(hf_cases.model("clip"), "tome", {"name": "constant_r", "r": 1})
    export_model(wrapped, tmp_path, "torch")
    config = json.loads((tmp_path / "preprocess.json").read_text())
    assert config["mean"] == pytest.approx([0.4815, 0.4578, 0.4082], abs=1e-3)
    assert config["input_size"] == [3, 32, 32] and config["crop_pct"] == 1.0


@pytest.mark.parametrize(("name", "kind"), [("siglip2", "onnx"), ("siglip2-head", "openvino")])
def test_siglip_2_answers_as_torch(name: str, kind: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers", minversion="5.0")
    pytest.importorskip("onnxscript")
    pytest.importorskip({"onnx": "onnxruntime"}.get(kind, kind))
    model = zoo.wrap(
        hf_cases.model(name, num_hidden_layers=2), "tome", {"name": "constant_r", "r": 1}
    )
    found = export_model(model, tmp_path / "m", kind, images=[torch.randn(3, 3, 32, 32)])
    assert found.max_error < 1e-4 and found.agreement == 100 and found.n_real == 3


def test_a_failed_conversion_is_one_line_with_its_reason(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")

    @torch.library.custom_op("tokenzoo_tests::unheard_of", mutates_args=())
    def unheard_of(x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    unheard_of.register_fake(torch.empty_like)

    class Odd(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return unheard_of(x)

    with pytest.raises(ZooError) as refused:
        to_onnx(Odd().eval(), torch.randn(2, 3, 4, 4), tmp_path)
    said = str(refused.value)
    assert said.startswith("export.format=onnx cannot capture this model: ")
    assert "unheard_of" in said and "submit a PR" not in said
    assert "\x1b" not in said and "\n" not in said


def test_bfloat16_says_how_far_it_is(tmp_path: Path) -> None:
    model = small()
    found = export_model(model, tmp_path, "torch", "bfloat16")
    assert 0 < found.max_error < 0.5 and found.precision == "bfloat16"
    assert {p.dtype for p in model.parameters()} == {torch.float32}  # the model itself stays


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "precision"), [("openvino", "int8"), ("aoti", "float32")])
def test_dear_formats(kind: str, precision: str, tmp_path: Path) -> None:
    if kind == "openvino":
        pytest.importorskip("nncf")
    model = zoo.load("vit_digits", reducer="tome")
    words = ["weights=vit_digits", "data=digits", "task=export"]
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        row = evaluate(
            compose(
                "eval",
                [*words, "reducer=tome", f"export.format={kind}", f"export.precision={precision}"]
                + [f"export.folder={tmp_path}"],
            )
        )
    GlobalHydra.instance().clear()
    assert row["export"]["agreement"] > 90 and row["export"]["n_real"] == 64
    images = torch.rand(3, *model.tower.input_size(model.backbone))
    assert open_engine(tmp_path, kind, precision)(images.numpy()).shape == (3, 10)


def test_the_task_writes_a_row_and_a_folder(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    words = ["weights=vit_digits", "reducer=topk", "task=export", f"export.folder={tmp_path}/m"]
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        row = evaluate(compose("eval", [*words, "export.images=10"]))
    GlobalHydra.instance().clear()
    assert row["export"]["n_real"] == 10 and row["export"]["agreement"] == 100
    told = f"onnx in {tmp_path}/m | 100.0 % of 14 images as in torch"
    assert summary_line(row).endswith(told)
    torn = summary_line(row | {"export": row["export"] | {"n_undecided": 2}})
    assert torn == summary_line(row) + ", 2 decided by rounding"
    assert json.loads((tmp_path / "m" / "labels.json").read_text()) == list("0123456789")
    picture = tmp_path / "three.png"
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) * 4).save(picture)
    done = subprocess.run(
        [sys.executable, "-I", str(tmp_path / "m" / "run.py"), str(picture), "--json"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    outputs = json.loads(done.stdout)["outputs"]
    model = zoo.load("vit_digits", reducer="topk").eval()
    with Image.open(picture) as image:
        wanted = answers(model, eval_transform(data_config(model))(image)[None])[0]
    assert np.abs(np.array(outputs) - wanted).max() < 1e-3
    missing = subprocess.run(
        [sys.executable, str(tmp_path / "m" / "run.py"), str(tmp_path / "none.png")],
        capture_output=True, text=True,
    )  # fmt: skip
    assert missing.returncode == 2 and len(missing.stderr.splitlines()) == 1


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize("size", [(300, 200), (200, 301), (32, 32), (17, 40)])
@pytest.mark.parametrize("crop", [1.0, 0.9, 0.875])
def test_pictures_are_prepared_as_by_timm(mode: str, size: tuple[int, int], crop: float) -> None:
    namespace: dict[str, object] = {"__name__": "exported", "__file__": str(SCRIPT)}
    exec(compile(SCRIPT.read_text(), str(SCRIPT), "exec"), namespace)
    config = {
        "input_size": (3, 48, 48), "interpolation": "bicubic", "crop_pct": crop,
        "crop_mode": mode, "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225),
    }  # fmt: skip
    generator = np.random.default_rng(0)
    picture = Image.fromarray(generator.integers(0, 255, (*size[::-1], 3), dtype=np.uint8))
    ours = namespace["prepare"](picture, config)  # type: ignore[operator]
    assert np.abs(ours - eval_transform(config)(picture).numpy()).max() < 1e-5


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"format": "tflite"}, "export.format must be one of onnx, openvino, torch, aoti"),
        ({"precision": "int4"}, "export.precision must be one of float32, bfloat16, int8"),
        ({"format": "onnx", "precision": "bfloat16"}, "no bfloat16 products"),
        ({"format": "aoti", "precision": "int8"}, "type export.precision=float32|bfloat16"),
        ({"labels": ["a", "b"]}, "2 labels for a model of 10 classes"),
    ],
)
def test_wrong_options_are_one_line(options: dict, says: str, tmp_path: Path) -> None:
    with pytest.raises(ZooError) as refused:
        export_model(small(), tmp_path / "m", **options)
    assert says in str(refused.value) and "\n" not in str(refused.value)
    assert not (tmp_path / "m").exists()


def test_answers_that_are_no_vectors_are_one_line(tmp_path: Path) -> None:
    one, folder = {"name": "constant_r", "r": 1}, tmp_path / "m"
    with pytest.raises(ZooError, match=r"got one of the shape \(1, 63, 10\); .*global_pool="):
        export_model(zoo.wrap(backbone("plain", depth=2, global_pool=""), "tome", one), folder)
    pytest.importorskip("open_clip")
    from tests.test_open_clip import tiny

    tower = tiny(output_tokens=True)
    with pytest.raises(ZooError, match="got a tuple; .* open_clip does so with output_tokens=Fal"):
        export_model(zoo.wrap(tower, "tome", one), folder, "torch")
    assert not folder.exists()
    tower.output_tokens = False
    assert export_model(zoo.wrap(tower, "tome", one), folder, "torch").agreement == 100


def test_a_folder_without_a_graph_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadCheckpoint, match="there is no such file"):
        open_engine(tmp_path, "onnx")
    (tmp_path / "model.onnx").write_bytes(b"nothing")
    pytest.importorskip("onnxruntime")
    with pytest.raises(BadCheckpoint, match="cannot read it"):
        open_engine(tmp_path, "onnx")
    with pytest.raises(ZooError, match="float32 weights on the CPU"):
        export_model(small().bfloat16(), tmp_path / "m")


def test_other_weights_and_other_budgets_go_into_other_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def only_named(model: zoo.ReducedViT, folder: Path, **_: object) -> Bundle:
        known = {"folder": str(folder), "files": (), "format": "torch", "precision": "float32"}
        return Bundle(**{**dict.fromkeys(Bundle._fields), **known})

    monkeypatch.setattr("zoo.export.export_model", only_named)  # what it writes, others look at
    folders = set()
    for part, changed in (("a", 0.0), ("b", 1.0)):
        made = zoo.load("vit_digits")
        made.backbone.head.bias.data += changed
        save_pretrained(made, tmp_path / part / "model")
        for r in (2, 4):
            words = [f"weights={tmp_path}/{part}/model", "reducer=tome", f"schedule.r={r}"]
            words += ["task=export", "export.format=torch", f"paths.outputs={tmp_path}/out"]
            GlobalHydra.instance().clear()
            with initialize_config_dir(str(config_folder()), version_base="1.3"):
                row = evaluate(compose("eval", [*words, "export.images=2"]))
            folders.add(row["export"]["folder"])
    GlobalHydra.instance().clear()
    assert len(folders) == 4
