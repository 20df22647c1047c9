"""Backbones of other libraries by their names: in Python, on the command line, in recipes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import zoo
from zoo import backbones
from zoo.adapters.tower import tower_of
from zoo.checkpoint import save_pretrained
from zoo.checkpoint.config import CONFIG
from zoo.data.checks import data_config
from zoo.errors import BadCheckpoint, UnknownName, ZooError
from zoo.libraries import names
from zoo.results.rows import read_rows

R1 = {"name": "constant_r", "r": 1}


def rows(folder: Path) -> list[dict[str, Any]]:
    return list(read_rows(folder / "results" / "local" / "rows.jsonl"))


# ------------------------------------------------------------------------------------ names


@pytest.mark.parametrize(
    ("name", "prefix", "rest"),
    [
        ("hf:facebook/dinov2-small", "hf", "facebook/dinov2-small"),
        ("transformers:google/vit-base-patch16-224", "hf", "google/vit-base-patch16-224"),
        ("open_clip:ViT-B-32.openai", "open_clip", "ViT-B-32.openai"),
        ("open-clip:ViT-B-32", "open_clip", "ViT-B-32"),
        ("torchvision:vit_b_16", "torchvision", "vit_b_16"),
        ("deit_small_patch16_224", None, "deit_small_patch16_224"),
        ("timm:deit_small_patch16_224", None, "deit_small_patch16_224"),
    ],
)
def test_a_name_says_its_library(name: str, prefix: str | None, rest: str) -> None:
    library, found = names.split(name)
    assert (None if library is None else library.prefix, found) == (prefix, rest)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("torchvison:vit_b_16", "did you mean 'torchvision'"),
        ("keras:vit", "unknown library of backbones 'keras'"),
        ("hf:", "expected for example hf:facebook/dinov2-small"),
        ("torchvision:resnet50", "unknown vision transformer of torchvision 'resnet50'"),
        ("torchvision:vit_b_16.V9", "unknown weights of torchvision's vit_b_16"),
    ],
)
def test_odd_names_get_one_line(name: str, message: str) -> None:
    with pytest.raises((UnknownName, ZooError), match=message):
        zoo.create_model(name, "tome")


def test_names_are_listed_by_library_without_torch() -> None:
    code = (
        "import sys\n"
        "from zoo.cli.main import main\n"
        "assert main(['list', '--models', '*vit_b_1*']) == 0\n"
        "there = main(['list', '--models', 'hf:*dinov2-small*', '--json']) == 0\n"
        f"assert there == {names.installed(names.LIBRARIES['hf'])}\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "torchvision:vit_b_16"
    assert not names.installed(names.LIBRARIES["hf"]) or "hf:facebook/dinov2-small" in done.stdout


def test_towers_without_tokens_are_not_listed() -> None:
    pytest.importorskip("open_clip")
    listed = set(backbones.elsewhere("open_clip:*"))
    known = {"open_clip:ViT-B-32", "open_clip:ViT-B-16-SigLIP", "open_clip:ViTamin-B"}
    assert known <= listed
    assert not {"open_clip:RN50", "open_clip:convnext_base"} & listed
    assert set(backbones.elsewhere()) <= set(zoo.list_models())


def test_a_missing_library_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names, "installed", lambda library: False)
    for name in ("hf:facebook/dinov2-small", "open_clip:ViT-B-32"):
        with pytest.raises(ZooError, match=r"pip install 'tokenzoo\[[\w-]+\]'"):
            zoo.create_model(name, "tome")


def test_well_known_names_are_whole() -> None:
    """Every entry says what a configuration needs, and heads divide the width."""
    for name, entry in names.hf_configs().items():
        config = entry["config"]
        assert {"model_type", "hidden_size", "num_attention_heads", "patch_size"} <= set(config)
        assert config["hidden_size"] % config["num_attention_heads"] == 0, name
        assert len(entry["data"]["mean"]) == 3 and "/" in name


# ------------------------------------------------------------------------------- torchvision


def small_torchvision(**changes: Any) -> Any:
    return zoo.create_model("torchvision:vit_b_32", "tome", R1, img_size=128, **changes)


def test_torchvision_by_name(tmp_path: Path) -> None:
    model = small_torchvision(num_classes=5).eval()
    x = torch.randn(2, 3, 128, 128)
    with torch.no_grad():
        assert model(x).shape == (2, 5)
    assert model.recipe["backbone"]["name"] == "vit_b_32"
    assert model.pretrained_cfg["tag"] is None
    config = data_config(model)
    assert config["input_size"] == (3, 128, 128) and config["mean"] == (0.485, 0.456, 0.406)
    save_pretrained(model, tmp_path / "m")
    again = zoo.load(tmp_path / "m")
    with torch.no_grad():
        assert torch.equal(again(x), model(x))
    assert again.recipe == model.recipe and data_config(again) == config


def test_torchvision_arguments_that_do_not_exist() -> None:
    with pytest.raises(ZooError, match="has no argument 'depth'; expected img_size"):
        small_torchvision(depth=3)
    with pytest.raises(ZooError, match="square"):
        zoo.create_model("torchvision:vit_b_32", img_size=(64, 32))


def test_weights_out_of_reach_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision

    def nothing(*args: Any, **kwargs: Any) -> Any:
        raise OSError("no network\nat all")

    monkeypatch.setattr(torchvision.models.vision_transformer, "_vision_transformer", nothing)
    with pytest.raises(ZooError, match=r"cannot fetch the weights IMAGENET1K_V1 .*: no network at"):
        zoo.create_model("torchvision:vit_b_16", pretrained=True)


def test_torchvision_on_the_command_line(run: Any, tmp_path: Path) -> None:
    line = "eval backbone=torchvision backbone.name=vit_b_32 +backbone.args.img_size=128"
    code, out, err = run(f"{line} reducer=tome schedule.r=1 task=flops")
    assert (code, err) == (0, "") and "vit_b_32 + tome r=1" in out
    [row] = rows(tmp_path)
    assert row["recipe"]["backbone"]["library"] == "torchvision" and row["img_size"] == 128
    assert row["gmacs_fvcore"] == pytest.approx(row["gmacs"]["total"], rel=1e-5)


# --------------------------------------------------------------------------------- open_clip


@pytest.fixture(scope="module")
def open_clip() -> Any:
    return pytest.importorskip("open_clip")


def test_open_clip_by_name(open_clip: Any, tmp_path: Path) -> None:
    model = zoo.create_model("open_clip:ViT-S-32", "tome", R1, layers=2, img_size=96).eval()
    x = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        assert model(x).shape == (2, 384)
    assert model.depth == 2 and model.grid == (3, 3)
    assert data_config(model)["mean"] == pytest.approx((0.481, 0.458, 0.408), abs=1e-3)
    save_pretrained(model, tmp_path / "m")
    with torch.no_grad():
        assert torch.equal(zoo.load(tmp_path / "m")(x), model(x))


def test_open_clips_trunks_and_decoders_by_name(open_clip: Any) -> None:
    model = zoo.create_model("open_clip:ViT-B-32-SigLIP2-256", img_size=64)
    assert tower_of(model.backbone).input_size(model.backbone) == (3, 64, 64)
    assert data_config(model)["mean"] == (0.5, 0.5, 0.5)
    model = zoo.create_model("open_clip:coca_ViT-B-32", "tome", R1, layers=1).eval()
    with torch.no_grad():
        assert model(torch.randn(1, 3, 224, 224)).shape == (1, 512)


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("RN50", {}, "a ResNet, which has no tokens"),
        ("ViT-B-33", {}, "did you mean 'ViT-B-32'"),
        ("ViT-B-32.nobody", {}, "unknown weights of open_clip's ViT-B-32 'nobody'"),
        ("ViT-B-32", {"pretrained": True}, "choose one: name=ViT-B-32.TAG"),
        ("ViT-B-32", {"depth": 3}, "has no argument 'depth'"),
        ("ViT-B-32", {"num_classes": 3}, "answers with features and has no classifier"),
        ("ViT-S-32", {"layers": "many"}, "open_clip cannot build"),
    ],
)
def test_odd_open_clip_models_get_one_line(
    open_clip: Any, name: str, args: dict[str, Any], message: str
) -> None:
    with pytest.raises(ZooError, match=message):
        zoo.create_model(f"open_clip:{name}", "tome", **args)


def test_open_clip_on_the_command_line(open_clip: Any, run: Any, tmp_path: Path) -> None:
    line = "eval backbone=open_clip backbone.name=ViT-S-32 +backbone.args.layers=2"
    code, out, err = run(f"{line} reducer=tome schedule.r=5 task=flops")
    assert (code, err) == (0, "") and "ViT-S-32 + tome r=5" in out
    code, _, err = run("eval backbone=open_clip backbone.name=RN50 task=flops")
    assert code == 2 and err.count("\n") == 1 and "ResNet" in err
    code, _, err = run("eval backbone=open_clip:ViT-B-32 task=flops")
    assert code == 2 and "type backbone=open_clip backbone.name=ViT-B-32" in err


# ----------------------------------------------------------------------------------- recipes


def test_a_recipe_builds_what_it_says_and_reads_nothing_else(tmp_path: Path) -> None:
    model = small_torchvision().eval()
    save_pretrained(model, tmp_path / "m")
    config = json.loads((tmp_path / "m" / CONFIG).read_text())

    def refused(message: str, **changes: Any) -> None:
        changed = {**config, "backbone": {**config["backbone"], **changes}}
        (tmp_path / "m" / CONFIG).write_text(json.dumps(changed))
        with pytest.raises(BadCheckpoint, match=message):
            zoo.load(tmp_path / "m")

    refused("backbone.library must be one of", library="os")
    refused("expected the name of a model", name="../../etc/passwd")
    refused("expected the name of a model", name="a/b/c")
    args = config["backbone"]["args"]
    refused("has no argument 'weights'", args={**args, "weights": "x"})
    refused("needs 'image_size'", args={k: v for k, v in args.items() if k != "image_size"})
    refused("larger than any model's", args={**args, "num_layers": 10**6})
    refused("not those of vit_b_32", args={**args, "num_layers": 11})


def test_a_recipe_of_hugging_face_names_a_class_that_is_known(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from zoo.libraries.build import rebuild

    config = {"model_type": "vit", "hidden_size": 32}
    with pytest.raises(UnknownName, match="class of Hugging Face 'Trainer'"):
        rebuild("transformers", "x", None, {"class": "Trainer", "config": config})
    with pytest.raises(ZooError, match="needs 'class' and 'config'"):
        rebuild("transformers", "x", None, {"config": config})
    with pytest.raises(ZooError, match="kind 'llama'"):
        rebuild("transformers", "x", None, {"class": "ViTModel", "config": {"model_type": "llama"}})


# ------------------------------------------------------------------------------ Hugging Face


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A hub that cannot be reached, and what was asked of it."""
    pytest.importorskip("transformers")
    from zoo.libraries import hub as client

    asked: list[str] = []

    class Session:
        def head(self, url: str, **options: Any) -> None:
            asked.append(url)
            raise ConnectionError("Name or service not known")

    monkeypatch.setattr(client, "get_session", Session)
    monkeypatch.setattr(client.constants, "HF_HUB_OFFLINE", False)
    return asked


def test_a_name_that_is_not_known_is_asked_for_once(hub: list[str]) -> None:
    with pytest.raises(ZooError, match=r"unknown model .*'nope'; .*\(Name or service not known\)"):
        zoo.create_model("hf:nope", "tome")
    assert len(hub) == 1


def test_offline_the_hub_is_not_asked(hub: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from zoo.libraries import hub as client

    monkeypatch.setattr(client.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ZooError, match=r"'facebook/dinov2-smal'; did you mean.*HF_HUB_OFFLINE"):
        zoo.create_model("hf:facebook/dinov2-smal", "tome")
    assert hub == []


def folder(path: Path, config: Any, processor: Any = None) -> str:
    path.mkdir()
    text = config if isinstance(config, str) else json.dumps(config)
    (path / "config.json").write_text(text)
    if processor is not None:
        (path / "preprocessor_config.json").write_text(json.dumps(processor))
    return f"hf:{path}"


@pytest.mark.parametrize(
    ("config", "processor", "message"),
    [
        ({"model_type": "bert"}, None, "kind 'bert'; of Hugging Face can be reduced: vit"),
        ({}, None, "kind None"),
        ("{", None, "cannot be read"),
        ("[1]", None, "expected a mapping"),
        ({"model_type": "vit", "hidden_size": "wide"}, None, "is damaged|cannot build a ViTModel"),
        ({"model_type": "vit"}, {"image_mean": "grey"}, "image_mean must be a list of numbers"),
    ],
)
def test_odd_folders_get_one_line(
    hub: list[str], tmp_path: Path, config: Any, processor: Any, message: str
) -> None:
    with pytest.raises(ZooError, match=message) as error:
        zoo.create_model(folder(tmp_path / "m", config, processor), "tome")
    assert "\n" not in str(error.value) and hub == []


def test_wrong_names_of_hugging_face_on_the_command_line(hub: list[str], run: Any) -> None:
    code, _, err = run("eval backbone=hf backbone.name=nope task=flops")
    assert code == 2 and err.count("\n") == 1 and "unknown model of Hugging Face 'nope'" in err
    code, _, err = run("eval backbone=hf task=flops")
    assert code == 2 and "backbone.name" in err
    code, _, err = run("eval backbone=timm backbone.library=keras backbone.name=x task=flops")
    assert code == 2 and err.count("\n") == 1


def test_dinov2_without_a_network_is_timms(hub: list[str], run: Any, tmp_path: Path) -> None:
    """The same tokens and the same cost as timm's model of that name, and nothing is asked for."""
    for line in ("backbone=hf backbone.name=facebook/dinov2-small", "backbone=dinov2_small"):
        code, out, err = run(f"eval {line} reducer=tome schedule.r=13 task=flops")
        assert (code, err) == (0, ""), err
    one, other = rows(tmp_path)
    assert hub == []
    assert one["tokens"] == other["tokens"] and one["tokens"][-1] == [114, 101]
    assert one["gmacs"]["total"] == pytest.approx(other["gmacs"]["total"], rel=1e-3)
    assert one["gmacs_fvcore"] == pytest.approx(one["gmacs"]["total"], rel=1e-5)
    assert one["backbone"] == "facebook/dinov2-small" and one["tag"] is None


def test_every_well_known_class_is_run(hub: list[str]) -> None:
    from zoo.libraries.build import rebuild

    small = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
    for entry in {e["class"]: e for e in names.hf_configs().values()}.values():
        config = {**entry["config"], **small, "intermediate_size": 48, "image_size": 64}
        args = {"class": entry["class"], "config": {**config, "patch_size": 16}}
        model = zoo.wrap(rebuild("transformers", "x", None, args), "tome", R1, tensors=True).eval()
        with torch.no_grad():
            answer = model(torch.randn(1, 3, 64, 64))
        assert answer.ndim == 2 and answer.isfinite().all(), entry["class"]


@pytest.fixture
def dinov2(hub: list[str], tmp_path: Path) -> tuple[Any, str]:
    """A small DINOv2 with its weights, as a folder whose processor makes smaller images."""
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=2, image_size=70, patch_size=14
    )
    model = Dinov2Model(config).eval()
    torch.nn.init.normal_(model.embeddings.position_embeddings)
    model.save_pretrained(tmp_path / "dino")
    processor = {
        "do_center_crop": True,
        "crop_size": {"height": 42, "width": 42},
        "size": {"shortest_edge": 48},
        "resample": 3,
        "image_mean": [0.4, 0.4, 0.4],
        "image_std": [0.2, 0.2, 0.2],
    }
    (tmp_path / "dino" / "preprocessor_config.json").write_text(json.dumps(processor))
    return model, f"hf:{tmp_path / 'dino'}"


def test_a_folder_with_weights_and_a_processor(dinov2: tuple[Any, str], tmp_path: Path) -> None:
    original, name = dinov2
    x = torch.randn(2, 3, 42, 42)
    dense = zoo.create_model(name, pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(dense(x), original(x).pooler_output)
    assert data_config(dense) == {
        "input_size": (3, 42, 42),
        "mean": (0.4, 0.4, 0.4),
        "std": (0.2, 0.2, 0.2),
        "interpolation": "bicubic",
        "crop_pct": 42 / 48,
        "crop_mode": "center",
    }
    model = zoo.create_model(name, "tome", R1, pretrained=True).eval()
    save_pretrained(model, tmp_path / "m")
    again = zoo.load(tmp_path / "m")
    with torch.no_grad():
        assert torch.equal(again(x), model(x))
    assert again.recipe == model.recipe and data_config(again) == data_config(model)
    assert again.recipe["backbone"]["library"] == "transformers"
    other = zoo.create_model(name, pretrained=True, img_size=70).eval()
    with torch.no_grad():
        large = torch.randn(1, 3, 70, 70)
        assert torch.equal(other(large), original(large).pooler_output)


def test_a_classifier_of_hugging_face_keeps_its_names(hub: list[str], tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTForImageClassification

    words = {0: "cat", 1: "dog", 2: "cow"}
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=48,
        image_size=32,
        patch_size=8,
        id2label=words,
        label2id={v: k for k, v in words.items()},
    )
    ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    name, x = f"hf:{tmp_path / 'vit'}", torch.randn(2, 3, 32, 32)
    model = zoo.create_model(name, "tome", R1, pretrained=True).eval()
    assert model(x).shape == (2, 3)
    save_pretrained(model, tmp_path / "m")
    again = zoo.load(tmp_path / "m")
    assert again.pretrained_cfg["zoo_data"]["class_names"] == ["cat", "dog", "cow"]
    assert torch.equal(again(x), model(x))
    new = zoo.create_model(name, "tome", R1, pretrained=True, num_classes=5, img_size=48).eval()
    assert new(torch.randn(1, 3, 48, 48)).shape == (1, 5)
    assert "zoo_data" not in new.pretrained_cfg


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"depth": 3}, "a dinov2 of Hugging Face has no argument 'depth'"),
        ({"num_classes": 3}, "answers with features and has no classifier"),
    ],
)
def test_odd_arguments_of_hugging_face(
    dinov2: tuple[Any, str], args: dict[str, Any], message: str
) -> None:
    with pytest.raises(ZooError, match=message):
        zoo.create_model(dinov2[1], "tome", R1, **args)


def test_weights_that_are_nowhere_are_one_line(hub: list[str]) -> None:
    with pytest.raises(ZooError, match=r"not in the local cache, and the hub .*\(Name or service"):
        zoo.create_model("hf:facebook/dinov2-small", "tome", pretrained=True)
    assert len(hub) == 1
