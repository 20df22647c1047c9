"""Jumbo's files: official names, what is read from them, what is refused, where they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import timm.models._builder
import torch
from torch import Tensor

import zoo
from tests.test_jumbo import KINDS, TINY, kinds, make, pictures
from zoo.adapters.hollow import hollow
from zoo.checkpoint import load_weights, save_pretrained
from zoo.errors import BadCheckpoint
from zoo.models.jumbo import Jumbo
from zoo.models.jumbo_weights import infer_args

SMALL: dict[str, Any] = {"img_size": 64, "depth": 2}


def first_release(slots: int = 6, width: int = 96) -> dict[str, Tensor]:
    """A cut-out of a first-release file: the names and shapes by which it is known."""
    wide = slots * width
    return {
        "cls_token": torch.zeros(1, slots, width),
        "pos_embed": torch.zeros(1, 196, width),
        "patch_embed.proj.weight": torch.zeros(width, 3, 16, 16),
        "blocks.0.ls1.gamma": torch.zeros(width),
        "blocks.0.ls3.gamma": torch.zeros(wide),
        "blocks.0.jumbo_mlp.fc1.weight": torch.zeros(4 * wide, wide),
        "norm.weight": torch.zeros(wide),
        "head.weight": torch.zeros(1000, wide),
    }


def official(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As in the published files: a bare state dict, the unused class token in it."""
    assert "cls_token" in state and "jumbo_token" in state
    return state


# ---------------------------------------------------------------------------- names


def test_names_are_the_official_ones() -> None:
    names = {
        *("pos_embed", "cls_token", "jumbo_token", "patch_embed.proj.weight"),
        *("patch_embed.proj.bias", "norm.weight", "norm.bias", "head.weight", "head.bias"),
        *(f"jumbo_mlp.fc{i}.{part}" for i in (1, 2) for part in ("weight", "bias")),
    }
    for i in range(3):
        parts = ("norm1", "norm2", "norm3", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
        names |= {f"blocks.{i}.{p}.{end}" for p in parts for end in ("weight", "bias")}
    assert set(make().state_dict()) == names


def test_loading_is_strict_but_for_the_unused_token() -> None:
    model, state = make(), make(seed=1).state_dict()
    without = {k: v for k, v in state.items() if k != "cls_token"}
    model.load_state_dict(without)
    wrapped = zoo.wrap(make(), None)
    wrapped.load_state_dict({f"backbone.{k}": v for k, v in without.items()})
    with torch.no_grad():
        assert torch.equal(model(pictures()), make(seed=1)(pictures()))
        assert torch.equal(wrapped.eval()(pictures()), model(pictures()))
    for name in ("jumbo_token", "blocks.1.norm3.bias", "jumbo_mlp.fc2.weight"):
        with pytest.raises(RuntimeError, match=f"Missing key.*{name}"):
            model.load_state_dict({k: v for k, v in state.items() if k != name})
    with pytest.raises(RuntimeError, match="Unexpected key.*reg_token"):
        model.load_state_dict({**state, "reg_token": torch.zeros(1)})


# ---------------------------------------------------------------------------- inference


@kinds
def test_the_architecture_is_read_from_the_weights(kind: str) -> None:
    model = make(kind, depth=2, jumbo_tokens=5, img_size=24)
    again = Jumbo.from_state_dict(model.state_dict(), num_heads=3).eval()
    assert again.jumbo_tokens == 5 and len(again.blocks) == 2
    with torch.no_grad():
        assert torch.equal(again(pictures(2, 24, 24)), model(pictures(2, 24, 24)))


@pytest.mark.parametrize("size", ["pico", "nano", "tiny", "small", "base"])
def test_heads_follow_from_the_official_sizes(size: str) -> None:
    with hollow():
        model = timm.create_model(f"jumbo_{size}_patch16_224")
        args = infer_args(model.state_dict())
        same = Jumbo(**args)
    assert args["num_heads"] == model.blocks[0].attn.num_heads
    assert args["img_size"] == (224, 224) and args["patch_size"] == (16, 16)
    assert zoo.profile(same).macs == zoo.profile(model).macs


def test_what_cannot_be_read_is_asked_for() -> None:
    state = make(img_size=(24, 40)).state_dict()
    with pytest.raises(BadCheckpoint, match="heads of a width of 48 cannot be guessed"):
        infer_args(state)
    with pytest.raises(BadCheckpoint, match="a grid of 60 patches is no square"):
        infer_args(state, num_heads=3)
    assert infer_args(state, 3, (24, 40))["img_size"] == (24, 40)
    with pytest.raises(BadCheckpoint, match="not the weights of a Jumbo: jumbo_token"):
        infer_args(timm.create_model("test_vit").state_dict())


# ---------------------------------------------------------------------------- refused


def test_first_release_files_are_refused_with_the_reason(tmp_path: Path) -> None:
    state = first_release()
    path = tmp_path / "jumbo_pico_i1k_finetuned_224.pt"
    torch.save(state, path)
    model = timm.create_model("jumbo_pico_patch16_224")
    reason = "Jumbo's first release .* a different architecture"
    with pytest.raises(BadCheckpoint, match=reason):
        model.load_state_dict(state)
    with pytest.raises(BadCheckpoint, match=reason):
        zoo.wrap(model, None).load_state_dict({f"backbone.{k}": v for k, v in state.items()})
    with pytest.raises(BadCheckpoint, match=reason):
        Jumbo.from_state_dict(state)
    with pytest.raises(BadCheckpoint, match=f"i1k_finetuned_224.pt: weights of {reason}"):
        load_weights(model, path)
    with pytest.raises(BadCheckpoint, match=reason):
        timm.create_model(
            "jumbo_pico_patch16_224",
            pretrained=True,
            pretrained_cfg_overlay={"file": str(path)},
        )


@pytest.mark.parametrize("name", ["blocks.0.ls1.gamma", "blocks.0.jumbo_mlp.fc1.weight"])
def test_either_sign_of_another_architecture_is_enough(name: str) -> None:
    state = {**make().state_dict(), name: torch.zeros(1)}
    with pytest.raises(BadCheckpoint, match="architecture|jumbo_mlp='unshared'"):
        make().load_state_dict(state)
    if "mlp" in name:
        make("unshared").load_state_dict(make("unshared", seed=1).state_dict())
        with pytest.raises(BadCheckpoint, match="first release"):
            old = {k: v for k, v in make("unshared").state_dict().items() if k != "jumbo_token"}
            make("unshared").load_state_dict(old)


def test_other_vits_are_not_called_a_first_release() -> None:
    deit3 = timm.create_model("test_vit", init_values=1e-4).state_dict()
    with pytest.raises(RuntimeError, match="Missing key"):
        make().load_state_dict(deit3)


# ---------------------------------------------------------------------------- published files


@pytest.mark.parametrize("size", ["pico", "nano", "tiny", "small", "base"])
def test_pretrained_means_the_published_file(size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def download(url: str, **kwargs: Any) -> dict[str, Tensor]:
        asked.update(kwargs, url=url)
        raise ConnectionError("no network in tests")

    monkeypatch.setattr(timm.models._builder, "load_state_dict_from_url", download)
    with pytest.raises(ConnectionError), hollow():
        timm.create_model(f"jumbo_{size}_patch16_224", pretrained=True)
    base = "https://huggingface.co/antofuller/jumbo/resolve/main"
    assert asked["url"] == f"{base}/jumbo_{size}.pth"
    assert asked["weights_only"] is True
    assert f"jumbo_{size}_patch16_224.in1k" in timm.list_pretrained("jumbo*")


def test_preprocessing_is_that_of_the_official_evaluation() -> None:
    with hollow():
        model = timm.create_model("jumbo_small_patch16_224")
    data = timm.data.resolve_model_data_config(model)
    assert data["crop_pct"] == 1.0 and data["interpolation"] == "bilinear"
    assert data["input_size"] == (3, 224, 224) and data["mean"] == (0.485, 0.456, 0.406)


def test_an_official_file_goes_through_timm_to_other_sizes_and_classes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = timm.create_model("jumbo_pico_patch16_224", depth=2).eval()
    torch.nn.init.normal_(source.head.weight, std=0.1)
    path = tmp_path / "jumbo_pico.pth"
    torch.save(official(source.state_dict()), path)

    def load(**kwargs: Any) -> Jumbo:
        return timm.create_model(
            "jumbo_pico_patch16_224",
            pretrained=True,
            depth=2,
            pretrained_cfg_overlay={"file": str(path)},
            **kwargs,
        ).eval()

    x, y = torch.randn(2, 3, 224, 224), torch.randn(2, 3, 96, 128)
    with torch.no_grad():
        assert torch.equal(load()(x), source(x))
        # A table resampled on loading and one resampled on the fly are the same numbers.
        source.set_input_size((96, 128))
        assert torch.equal(load(img_size=(96, 128))(y), source(y))
        assert torch.equal(load(dynamic_img_size=True)(y), source(y))
        assert load(num_classes=7)(x).shape == (2, 7)
        assert torch.equal(
            load(num_classes=0)(x), load().forward_head(load().forward_features(x), pre_logits=True)
        )


def test_an_official_file_loads_into_a_wrapped_model(tmp_path: Path) -> None:
    source, target = make(), zoo.wrap(make(seed=1), "tome", {"name": "constant_r", "r": 4})
    path = tmp_path / "jumbo.pth"
    torch.save(official(source.state_dict()), path)
    load_weights(target, path)
    for name, value in target.unwrap().state_dict().items():
        assert torch.equal(value, source.state_dict()[name])
    other = Jumbo(**{**TINY, "jumbo_tokens": 2})
    with pytest.raises(BadCheckpoint, match="of another shape"):
        load_weights(other, path)


# ---------------------------------------------------------------------------- model folders


@kinds
def test_a_model_folder_keeps_the_options(kind: str, tmp_path: Path) -> None:
    options = {k: v for k, v in KINDS[kind].items()}
    model = zoo.create_model(
        "jumbo_digits", "tome", {"name": "constant_r", "r": 6}, depth=2, **options
    ).eval()
    torch.nn.init.normal_(model.unwrap().head.weight)
    x = torch.randn(2, 1, 16, 16)
    save_pretrained(model, tmp_path / "model")
    again = zoo.load(str(tmp_path / "model"))
    assert again.recipe == model.recipe
    with torch.no_grad():
        assert torch.equal(again(x), model(x))
