"""Models on disk: what is written comes back, and an interrupted save loses nothing."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import reduction
import zoo
from reduction.base import Card
from reduction.mixins.ranking import ScoreReducer
from zoo import checkpoint
from zoo.checkpoint import config as cfg
from zoo.checkpoint import folder as folder_module
from zoo.errors import ZooError

# test_vit at 64 px: 16 patches, 6 blocks, 0.37 M parameters.
BACKBONE = {"img_size": 64, "num_classes": 7}
SCHEDULES = {
    "constant_r": {"name": "constant_r", "r": 2},
    "r list": {"name": "constant_r", "r": [3, 0, 2]},
    "decreasing r": {"name": "constant_r", "r": 1, "inflection": -1.0},
    "keep_rate": {"name": "keep_rate", "rate": 0.7, "blocks": [1, 3], "rounding": "ceil"},
    "per_block": {"name": "per_block", "keep": [14, None, 12, None, 9, None]},
    "target_gmacs": {"name": "target_gmacs", "fraction": 0.7},
}


def make(reducer=None, schedule=None, **kwargs):
    torch.manual_seed(0)
    return zoo.create_model(
        "test_vit", reducer=reducer, schedule=schedule, **{**BACKBONE, **kwargs}
    ).eval()


def images(channels: int = 3, size: int = 64):
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(1))


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.fixture
def saved(tmp_path):
    """A saved model with a reducer, as a folder."""
    return checkpoint.save_pretrained(make("evit"), tmp_path / "model")


CASES = [("none", None)] + [(r, s) for r in ("tome", "evit") for s in SCHEDULES]


@pytest.mark.parametrize(("reducer", "schedule"), CASES)
def test_save_load_save_is_the_identity(tmp_path, reducer, schedule):
    spec = None if reducer == "none" else reducer
    if (reducer, schedule) == ("evit", "r list"):
        spec = {"name": "evit", "fuse": False}
    model = make(spec, SCHEDULES.get(schedule))
    checkpoint.save_pretrained(model, tmp_path / "a")
    loaded = zoo.load(tmp_path / "a")
    checkpoint.save_pretrained(loaded, tmp_path / "b")

    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert (tmp_path / "a" / "schedule.json").exists() == (schedule == "per_block")
    assert not loaded.training
    assert loaded.recipe == model.recipe
    with torch.no_grad():
        assert torch.equal(model(images()), loaded(images()))
    assert loaded.token_counts() == model.token_counts()


def test_weights_have_the_names_that_timm_reads(saved):
    model = make("evit")
    plain = timm.create_model(
        "test_vit", checkpoint_path=str(saved / "model.safetensors"), **BACKBONE
    )
    assert all(
        torch.equal(v, model.unwrap().state_dict()[k]) for k, v in plain.state_dict().items()
    )
    assert not (saved / "reducer.safetensors").exists()


def test_recipe_holds_names_and_no_import_paths(saved):
    config = json.loads((saved / "config.json").read_text())
    assert config["format"] == 1
    assert config["reducer"]["name"] == "evit"
    assert config["backbone"]["name"] == "test_vit"
    assert config["weights"]["sha256"] == checkpoint.file_sha256(saved / "model.safetensors")
    assert checkpoint.weights_sha256(saved) == config["weights"]["sha256"]
    assert {"torch", "timm"} <= set(config["written_by"])
    text = json.dumps({k: config[k] for k in ("backbone", "reducer", "schedule", "plugins")})
    assert "reduction." not in text and "_target_" not in text


def test_reducer_and_schedule_can_be_replaced_on_loading(saved):
    x = images()
    dense = zoo.load(saved, reducer=None)
    assert dense.reducer is None
    with torch.no_grad():
        assert torch.equal(dense(x), dense.unwrap()(x))
    tome = zoo.load(saved, reducer="tome", schedule={"name": "constant_r", "r": 1})
    assert tome.recipe["reducer"]["name"] == "tome"
    assert tome.token_counts()[0] == (17, 16)
    # A new reducer without a schedule runs under the one that was saved.
    assert zoo.load(saved, reducer="topk").recipe["schedule"] == zoo.load(saved).recipe["schedule"]


def test_backbone_overrides(saved):
    bigger = zoo.load(saved, img_size=96)  # the position embedding is resampled
    assert bigger(images(size=96)).shape == (2, 7)
    other = zoo.load(saved, num_classes=3)  # a new head on the saved body
    assert other(images()).shape == (2, 3)
    assert torch.equal(
        other.unwrap().blocks[0].attn.qkv.weight, make().unwrap().blocks[0].attn.qkv.weight
    )
    assert other.recipe["backbone"]["num_classes"] == 3


def test_preprocessing_travels(tmp_path):
    data = {
        "mean": [0.1, 0.2, 0.3],
        "std": [1, 2, 3],
        "interpolation": "nearest",
        "dataset": "mine",
    }
    checkpoint.save_pretrained(make(), tmp_path / "a", data=data)
    model = zoo.load(tmp_path / "a")
    resolved = timm.data.resolve_model_data_config(model.unwrap())
    assert resolved["mean"] == (0.1, 0.2, 0.3)
    assert resolved["interpolation"] == "nearest"
    assert resolved["input_size"] == (3, 64, 64)
    checkpoint.save_pretrained(model, tmp_path / "b")
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert checkpoint.read_config(tmp_path / "b")["data"]["dataset"] == "mine"


class _Learned(ScoreReducer):
    """A reducer with a parameter and a buffer, as later methods have."""

    card = Card("t", "a", "v", 2000, None, None, None, "prune", "predictor")

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.width = width
        self.direction = nn.Parameter(torch.randn(width))
        self.register_buffer("steps", torch.tensor(3))

    def score(self, t, s, step):
        return t.patches @ self.direction


@pytest.fixture
def learned(monkeypatch):
    from reduction import registry

    methods = dict(registry.METHODS.load())
    monkeypatch.setattr(registry.METHODS, "classes", methods)
    reduction.register("learned_for_test")(_Learned)
    yield
    _Learned.name = ""


def test_parameters_of_reducers_are_saved_apart(tmp_path, learned):
    model = make("learned_for_test")
    folder = checkpoint.save_pretrained(model, tmp_path / "a")
    kept = checkpoint.files.read_tensors(folder / "reducer.safetensors")
    assert sorted(kept) == ["reducer.direction", "reducer.steps"]
    loaded = zoo.load(folder)
    with torch.no_grad():
        assert torch.equal(model(images()), loaded(images()))
    # Another method does not want them.
    assert zoo.load(folder, reducer="topk").recipe["reducer"]["name"] == "topk"
    # Nor does one that brings parameters of its own: those keep their initial values.
    reduction.register("other_for_test")(type("_Other", (_Learned,), {}))
    other = zoo.load(folder, reducer={"name": "other_for_test", "width": 1})
    assert other.reducer.direction.shape == (1,)
    with pytest.raises(ZooError, match="reducer or plugins do not fit"):
        checkpoint.load_weights(make({"name": "other_for_test", "width": 1}), folder)
    # And they are checked like the weights.
    checkpoint.files.write_tensors(
        {**kept, "reducer.steps": torch.tensor(4)}, folder / "reducer.safetensors"
    )
    with pytest.raises(ZooError, match="reducer.safetensors.*sha256"):
        zoo.load(folder)


def test_unregistered_reducer_is_refused_before_anything_is_written(tmp_path):
    class Mine(_Learned):
        name = ""

    with pytest.raises(ZooError, match="register"):
        checkpoint.save_pretrained(make(Mine()), tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_values_without_a_json_form_are_refused(tmp_path):
    with pytest.raises(ZooError, match="LayerNorm"):
        checkpoint.save_pretrained(make(norm_layer=nn.LayerNorm), tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_recipe_alone_means_the_tag_s_own_weights(tmp_path, monkeypatch):
    folder = checkpoint.save_pretrained(make("tome"), tmp_path / "a", weights=False)
    assert not (folder / "model.safetensors").exists()
    asked = {}
    real = timm.create_model

    def create_model(name, pretrained=False, **kwargs):
        asked.update(name=name, pretrained=pretrained)
        return real(name, **kwargs)

    monkeypatch.setattr(timm, "create_model", create_model)
    assert zoo.load(folder).recipe["reducer"]["name"] == "tome"
    assert asked == {"name": "test_vit.r160_in1k", "pretrained": True}
    bare = zoo.wrap(timm.models.VisionTransformer(img_size=64, embed_dim=48, depth=1), "tome")
    with pytest.raises(ZooError, match="pretrained tag"):
        checkpoint.save_pretrained(bare, tmp_path / "b", weights=False)


def test_a_recipe_that_would_build_another_model_is_noticed(tmp_path):
    """The weights are written all the same, and correcting config.json is enough."""
    model = zoo.wrap(timm.create_model("test_vit", global_pool="avg", fc_norm=False), "tome")
    with pytest.warns(UserWarning, match="global_pool is 'avg', would be 'token'"):
        folder = checkpoint.save_pretrained(model, tmp_path / "a")
    config = json.loads((folder / "config.json").read_text())
    config["backbone"]["args"] = {"global_pool": "avg", "fc_norm": False}
    (folder / "config.json").write_text(json.dumps(config))
    x = images(size=160)
    with torch.no_grad():
        assert torch.equal(zoo.load(folder)(x), model.eval()(x))
    small = zoo.wrap(timm.create_model("test_vit", img_size=64), "tome")
    with pytest.warns(UserWarning, match=r"pos_embed is \(1, 17, 64\), would be \(1, 101, 64\)"):
        checkpoint.save_pretrained(small, tmp_path / "b")
    small.backbone_args = {"img_size": 64}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        zoo.load(checkpoint.save_pretrained(small, tmp_path / "b"))


def test_metrics_go_into_the_card_and_nothing_else_does(tmp_path):
    rows = [
        {"dataset": "digits", "split": "test", "top1": 12.5, "gmacs": {"total": 0.01}, "top5": None}
    ]
    folder = checkpoint.save_pretrained(make("tome"), tmp_path / "a", metrics=rows)
    card = (folder / "README.md").read_text()
    assert "| digits | test | 12.50 | 0.01 |" in card
    assert "top-5" not in card
    assert "2210.09461" in card
    assert 'timm.create_model("test_vit", num_classes=7, img_size=64, checkpoint_path' in card
    assert json.loads((folder / "metrics.json").read_text()) == rows
    # Saving without metrics takes the old ones away: they belonged to other weights.
    checkpoint.save_pretrained(make("tome"), folder)
    assert not (folder / "metrics.json").exists()
    assert "Results" not in (folder / "README.md").read_text()


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("moment", ["tensors", "config", "first rename", "second rename"])
def test_interrupted_save_leaves_the_old_folder(tmp_path, saved, monkeypatch, moment):
    (saved / "notes.txt").write_text("mine")
    before = files(saved)
    other = make("tome")
    with torch.no_grad():
        other.unwrap().head.weight.zero_()

    def stop(*args, **kwargs):
        raise Interrupted

    if moment == "tensors":
        monkeypatch.setattr(folder_module, "write_tensors", stop)
    elif moment == "config":
        real_dump = cfg.dump
        monkeypatch.setattr(
            cfg, "dump", lambda v, p: stop() if p.name == "config.json" else real_dump(v, p)
        )
    else:
        real, calls = os.replace, []

        def replace(a, b):
            calls.append(a)
            if len(calls) == (1 if moment == "first rename" else 2):
                raise Interrupted
            real(a, b)

        monkeypatch.setattr(folder_module.os, "replace", replace)
    with pytest.raises(Interrupted):
        checkpoint.save_pretrained(other, saved)
    monkeypatch.undo()
    assert files(saved) == before
    assert [p.name for p in saved.parent.iterdir()] == [saved.name], "nothing left lying about"
    assert zoo.load(saved).recipe["reducer"]["name"] == "evit"


def test_saving_again_replaces_the_model_and_keeps_other_files(saved):
    (saved / "notes.txt").write_text("mine")
    (saved / "logs").mkdir()
    (saved / "logs" / "a.csv").write_text("1")
    checkpoint.save_pretrained(make("tome"), saved)
    assert zoo.load(saved).recipe["reducer"]["name"] == "tome"
    assert (saved / "notes.txt").read_text() == "mine"
    assert (saved / "logs" / "a.csv").read_text() == "1"
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]


def test_a_model_is_as_readable_as_any_other_file(saved):
    (saved / "notes.txt").touch()
    usual = (saved / "notes.txt").stat().st_mode
    assert {p.stat().st_mode for p in saved.iterdir()} == {usual}


def test_edited_card_is_kept(saved):
    (saved / "README.md").write_text("my own words")
    checkpoint.save_pretrained(make("tome"), saved)
    assert (saved / "README.md").read_text() == "my own words"


def test_folder_with_other_content(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "train.log").write_text("log")
    checkpoint.save_pretrained(make(), tmp_path / "run")
    assert (tmp_path / "run" / "train.log").read_text() == "log"
    assert zoo.load(tmp_path / "run").recipe["backbone"]["name"] == "test_vit"
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text('{"architectures": ["Bert"]}')
    with pytest.raises(ZooError, match="did not write"):
        checkpoint.save_pretrained(make(), tmp_path / "hf")
    (tmp_path / "file").write_text("")
    with pytest.raises(ZooError, match="is a file"):
        checkpoint.save_pretrained(make(), tmp_path / "file")


def test_lost_folder_is_found_again(tmp_path, saved):
    """Power cut between the two renames: the message says where the model is."""
    hidden = tmp_path / ".model.old-x"
    hidden.mkdir()
    saved.rename(hidden / "model")
    with pytest.raises(ZooError, match=r"\.model\.old-x"):
        zoo.load(saved)


def test_shipped_models_load_offline():
    names = checkpoint.list_assets()
    assert "vit_digits" in names
    for name in names:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model = zoo.load(name)
        assert model.recipe["backbone"]["name"]


def test_hub_folder(saved, monkeypatch):
    asked = {}

    def snapshot_download(repo, revision=None, allow_patterns=None):
        asked.update(repo=repo, revision=revision)
        return str(saved)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert zoo.load("hf-hub:someone/model@v1").recipe["reducer"]["name"] == "evit"
    assert asked == {"repo": "someone/model", "revision": "v1"}
