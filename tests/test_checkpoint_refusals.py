"""What must not be loaded is refused with one clear line, and the model stays as it was."""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path

import pytest
import timm
import torch

import zoo
from tests.test_checkpoint import BACKBONE, images, make
from zoo import checkpoint
from zoo.errors import BadCheckpoint, UnknownName


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return checkpoint.save_pretrained(make("evit"), tmp_path_factory.mktemp("m") / "model")


@pytest.fixture
def saved(tmp_path, folder):
    return Path(shutil.copytree(folder, tmp_path / "model"))


def refusal(*args, **kwargs) -> str:
    with pytest.raises(BadCheckpoint) as caught:
        zoo.load(*args, **kwargs)
    text = str(caught.value)
    assert "\n" not in text, "one line"
    return text


def weights_refusal(model, path, **kwargs) -> str:
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(BadCheckpoint) as caught:
        checkpoint.load_weights(model, path, **kwargs)
    text = str(caught.value)
    assert "\n" not in text and str(path) in text
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()), "left unchanged"
    return text


def edit(folder: Path, **changes) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config.update(changes)
    path.write_text(json.dumps(config))


def cut(path: Path, share: float = 0.5) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


class Code:
    def __reduce__(self):
        return (os.system, ("touch it_ran",))


# ------------------------------------------------------------------------------------ model folders


@pytest.mark.parametrize("share", [0.9, 0.5, 1e-5, 0.0])
def test_truncated_safetensors(saved, share):
    cut(saved / "model.safetensors", share)
    text = refusal(saved)
    assert ("cut short" in text or "empty" in text) and "model.safetensors" in text


def test_other_weights_under_the_same_name(saved):
    model = make()
    with torch.no_grad():
        model.unwrap().head.bias.add_(1)
    checkpoint.files.write_tensors(model.unwrap().state_dict(), saved / "model.safetensors")
    text = refusal(saved)
    assert "sha256" in text and "model.safetensors" in text


def test_missing_files(tmp_path, saved):
    (tmp_path / "empty").mkdir()
    assert "config.json" in refusal(tmp_path / "empty")
    (saved / "model.safetensors").unlink()
    assert "model.safetensors: no such file" in refusal(saved)


@pytest.mark.parametrize(
    ("name", "text"), [("nowhere/at/all", "nowhere/at/all"), ("lost.ckpt", "lost.ckpt")]
)
def test_missing_paths(name, text):
    assert text in refusal(name)


def test_unknown_name_lists_the_nearest():
    with pytest.raises(UnknownName, match="'vit_digits'"):
        zoo.load("vit_digit")


def test_newer_format(saved):
    edit(saved, format=2, zoo="9.9")
    text = refusal(saved)
    assert "format 2" in text and "9.9" in text and "pip install -U" in text


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"format": "1"}, "format"),
        ({"backbone": {}}, "backbone"),
        ({"backbone": "deit"}, "backbone"),
        ({"reducer": "tome"}, "reducer"),
        ({"reducer": {"method": "tome"}}, "name"),
        ({"schedule": [1]}, "schedule"),
        ({"plugins": {"name": "clc"}}, "plugins"),
        ({"weights": "model.safetensors"}, "weights"),
        ({"weights": {"model": "../other.safetensors"}}, "weights.model"),
        ({"schedule": {"name": "per_block", "file": "../schedule.json"}}, "schedule.file"),
        ({"schedule": {"name": "per_block", "file": "schedule.json"}}, "schedule.json"),
        ({"backbone": {"name": "hf-hub:someone/else"}}, "elsewhere"),
        ({"backbone": {"name": "test_vit", "args": {"pretrained_cfg": {}}}}, "pretrained_cfg"),
        ({"backbone": {"name": "test_vitt"}}, "'test_vit'"),
        ({"backbone": {"name": "test_vit", "args": {"colour": 3}}}, "colour"),
        ({"backbone": {"name": "test_vit3", "args": {"img_size": 64}}}, "class token"),
        ({"reducer": {"name": "tomee"}}, "'tome'"),
        ({"reducer": {"name": "evit", "fuse_more": 1}}, "fuse_more"),
        ({"schedule": {"name": "keep_rate", "rate": 1.5}}, "1.5"),
        ({"backbone": {"name": "test_vit"}, "weights": {}}, "names no pretrained tag"),
    ],
)  # fmt: skip
def test_bad_recipes(saved, change, word):
    edit(saved, **change)
    assert word in refusal(saved)


def test_broken_json(saved):
    cut(saved / "config.json")
    assert "not valid JSON" in refusal(saved)


def test_unknown_keys_are_named_with_their_writer(saved):
    config = json.loads((saved / "config.json").read_text())
    edit(saved, zoo="7.7", colour="red", backbone={**config["backbone"], "shape": 1})
    with pytest.warns(UserWarning, match=r"backbone\.shape, colour .*7\.7"):
        model = zoo.load(saved)
    with torch.no_grad():
        assert torch.equal(model(images()), make("evit")(images()))


def test_recipe_of_another_architecture(saved):
    other = {"name": "test_vit3", "num_classes": 7, "args": {"img_size": 64}}
    edit(saved, backbone=other, reducer=None, schedule=None)
    text = refusal(saved)
    assert "not those of test_vit3" in text
    assert "missing (" in text and "of another shape" in text


def test_hub_is_out_of_reach(monkeypatch):
    from huggingface_hub import errors

    def offline(*args, **kwargs):
        raise errors.LocalEntryNotFoundError("Cannot find the requested files in the disk cache")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    text = refusal("hf-hub:someone/model")
    assert "hf-hub:someone/model" in text and "network" in text
    monkeypatch.undo()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "network" in refusal("hf-hub:someone/not-in-the-cache")
    assert "ORG/NAME" in refusal("hf-hub:a/b/c")


# -------------------------------------------------------------------------------------- plain files


def test_pickled_code_is_refused_and_does_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, zipped in (("new.pth", True), ("old.pth", False)):
        torch.save(
            {"model": make().unwrap().state_dict(), "extra": Code()},
            name,
            _use_new_zipfile_serialization=zipped,
        )
        text = weights_refusal(make(), Path(name))
        assert "refused" in text and "system" in text
        assert "refused" in refusal(f"./{name}")
    assert not Path("it_ran").exists()


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("share", [0.99, 0.5, 0.001, 0.0])
def test_truncated_torch_files(tmp_path, zipped, share):
    path = tmp_path / "cut.pth"
    torch.save(make().unwrap().state_dict(), path, _use_new_zipfile_serialization=zipped)
    cut(path, share)
    text = weights_refusal(make(), path)
    assert "cut short" in text or "empty" in text or "not a weights file" in text


def test_things_that_are_no_weights(tmp_path):
    (tmp_path / "page.pth").write_text("<html>404</html>")
    assert "not a weights file" in weights_refusal(make(), tmp_path / "page.pth")
    (tmp_path / "lfs.pth").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    assert "git lfs pull" in weights_refusal(make(), tmp_path / "lfs.pth")
    torch.save({"epoch": 3, "optimizer": {}}, tmp_path / "opt.pth")
    assert "no weights found" in weights_refusal(make(), tmp_path / "opt.pth")
    torch.save([torch.zeros(2)], tmp_path / "list.pth")
    assert "no weights found" in weights_refusal(make(), tmp_path / "list.pth")
    assert "no such file" in weights_refusal(make(), tmp_path / "absent.pth")


def test_weights_of_another_architecture(tmp_path):
    other = timm.create_model("test_vit3", **BACKBONE)
    torch.save(other.state_dict(), tmp_path / "other.pth")
    text = weights_refusal(make(), tmp_path / "other.pth")
    assert "not those of test_vit" in text
    assert "unexpected (" in text and "of another shape (" in text and "..." in text
    assert len(text) < 900, "first few names only"
    convnet = timm.create_model("resnet10t")
    torch.save(convnet.state_dict(), tmp_path / "resnet.pth")
    assert "missing (cls_token, pos_embed" in weights_refusal(make(), tmp_path / "resnet.pth")


def test_another_patch_size_is_not_resampled(tmp_path):
    torch.save(make(patch_size=8).unwrap().state_dict(), tmp_path / "p8.pth")
    assert "patch_embed.proj.weight is (64, 3, 8, 8)" in weights_refusal(
        make(), tmp_path / "p8.pth"
    )


def test_another_patch_size_is_resampled_where_it_is_asked_for(tmp_path):
    large = make(patch_size=8)
    checkpoint.save_pretrained(large, tmp_path / "p8")
    small = checkpoint.load(tmp_path / "p8", patch_size=4)
    old, new = (m.unwrap().patch_embed.proj for m in (large, small))
    # The small weight is the one that answers shrunken patches most as the large one answered.
    rows = torch.eye(64).reshape(64, 1, 8, 8)
    shrink = torch.nn.functional.interpolate(rows, size=(4, 4), mode="bicubic", antialias=True)
    found = torch.linalg.lstsq(
        shrink.reshape(64, 16), old.weight.detach().reshape(-1, 64).T, driver="gelsd"
    ).solution
    assert torch.allclose(new.weight.detach().reshape(-1, 16).T, found, atol=1e-4)
    assert small.unwrap().pos_embed.shape[1] - 1 == 4 * (large.unwrap().pos_embed.shape[1] - 1)


def test_wrong_number_of_classes_is_named(tmp_path):
    torch.save(make(num_classes=5).unwrap().state_dict(), tmp_path / "five.pth")
    text = weights_refusal(make(), tmp_path / "five.pth")
    assert "the file has 5 classes" in text and "has 7" in text and "num_classes=5" in text
    model = make()
    head = model.unwrap().head.weight.detach().clone()
    torch.manual_seed(5)
    other = timm.create_model("test_vit", img_size=64, num_classes=5)
    torch.save(other.state_dict(), tmp_path / "five.pth")
    checkpoint.load_weights(model, tmp_path / "five.pth", new_head=True)
    assert torch.equal(model.unwrap().head.weight, head)
    assert torch.equal(model.unwrap().pos_embed, other.pos_embed)


def test_files_that_training_scripts_write(tmp_path):
    torch.manual_seed(3)
    source = timm.create_model("test_vit", **BACKBONE)
    state = source.state_dict()
    args = argparse.Namespace(lr=0.1)
    layouts = {
        "plain.pth": state,
        "deit.pth": {"model": state, "epoch": 3, "args": args},
        "timm.pth.tar": {"state_dict": state, "arch": "test_vit", "args": args},
        "ddp.pth": {"model": {f"module.{k}": v for k, v in state.items()}},
        "compiled.pth": {f"_orig_mod.module.{k}": v for k, v in state.items()},
        "twice.pth": {"state_dict": {"model": state}},
        "ema.pth": {"model": make().unwrap().state_dict(), "model_ema": state},
    }
    for name, content in layouts.items():
        torch.save(content, tmp_path / name)
        for model in (make("tome"), make().unwrap()):
            assert checkpoint.load_weights(model, tmp_path / name) is model
            got = model.unwrap() if hasattr(model, "unwrap") else model
            assert all(torch.equal(v, state[k]) for k, v in got.state_dict().items()), name
    model = checkpoint.load_weights(make(), tmp_path / "ema.pth", ema=False)
    assert torch.equal(model.unwrap().head.weight, make().unwrap().head.weight)
    checkpoint.files.write_tensors(state, tmp_path / "plain.safetensors")
    model = checkpoint.load_weights(make(), tmp_path / "plain.safetensors")
    assert torch.equal(model.unwrap().head.weight, state["head.weight"])


def test_timm_converts_what_it_knows(tmp_path):
    """Another image size, and a patch embedding stored as a matrix, go through timm's filter."""
    state = make(img_size=96).unwrap().state_dict()
    weight = state["patch_embed.proj.weight"]
    state["patch_embed.proj.weight"] = weight.flatten(1)
    torch.save({"model": state}, tmp_path / "old.pth")
    model = checkpoint.load_weights(make(), tmp_path / "old.pth")
    assert torch.equal(model.unwrap().patch_embed.proj.weight, weight)
    assert model.unwrap().pos_embed.shape == make().unwrap().pos_embed.shape


def test_weights_of_a_model_folder(saved):
    model = timm.create_model("test_vit", **BACKBONE)
    checkpoint.load_weights(model, saved)
    assert torch.equal(model.head.weight, make().unwrap().head.weight)


# -------------------------------------------------------------------------------- Lightning files


def lightning(model, path: Path, **recipe) -> Path:
    """What Lightning writes for a module with the network in `net` and the recipe saved."""
    state = {f"net.{k}": v for k, v in model.state_dict().items()}
    state["train_loss.weight"] = torch.zeros(1)  # other parts of the module
    torch.save(
        {
            "epoch": 1,
            "global_step": 10,
            "pytorch-lightning_version": "2.6.6",
            "state_dict": state,
            "loops": {},
            "callbacks": {
                "ModelCheckpoint{'monitor': None}": {"best_model_score": torch.tensor(1.0)}
            },
            "optimizer_states": [{"state": {}, "param_groups": [{"lr": 1e-3}]}],
            "lr_schedulers": [],
            "hparams_name": "kwargs",
            "hyper_parameters": {"recipe": {**model.recipe, **recipe}, "lr": 1e-3},
        },
        path,
    )
    return path


def test_lightning_checkpoint(tmp_path):
    model = make("tome", {"name": "constant_r", "r": 2})
    path = lightning(model, tmp_path / "last.ckpt", data={"mean": [0.5], "dataset": "digits"})
    loaded = zoo.load(path)
    assert loaded.recipe == model.recipe
    with torch.no_grad():
        assert torch.equal(loaded(images()), model(images()))
    assert loaded.unwrap().pretrained_cfg["mean"] == (0.5,)
    other = checkpoint.load_weights(make(), path)
    assert torch.equal(other.unwrap().head.weight, model.unwrap().head.weight)
    assert zoo.load(path, reducer=None).reducer is None


def test_lightning_checkpoint_without_recipe(tmp_path):
    torch.save({"state_dict": {"net.a": torch.zeros(1)}}, tmp_path / "a.ckpt")
    assert "load_weights" in refusal(tmp_path / "a.ckpt")
    path = lightning(make("tome"), tmp_path / "b.ckpt", reducer={"name": "tome", "rr": 1})
    assert "rr" in refusal(path)
    path = lightning(make(), tmp_path / "c.ckpt", backbone={"name": "test_vit2", "args": BACKBONE})
    assert "not those of test_vit2" in refusal(path)
