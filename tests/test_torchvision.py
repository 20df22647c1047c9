"""torchvision's vision transformers: exact where nothing is reduced, and all that follows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchvision.models import VisionTransformer
from torchvision.models.vision_transformer import ConvStemConfig, Encoder

import zoo
from tests.towers import block_gap, gaps, shaken
from zoo.adapters.attention import attend
from zoo.checkpoint import save_pretrained
from zoo.cost.counters import torch_gmacs
from zoo.errors import UnsupportedModel, ZooError

R2 = {"name": "constant_r", "r": 2}


def tiny(**changes: Any) -> VisionTransformer:
    usual = {
        "image_size": 32,
        "patch_size": 8,
        "num_layers": 4,
        "num_heads": 2,
        "hidden_dim": 32,
        "mlp_dim": 48,
        "num_classes": 7,
    }
    return shaken(VisionTransformer(**{**usual, **changes}))  # type: ignore[return-value]


def stem() -> list[ConvStemConfig]:
    return [ConvStemConfig(8, 3, 2), ConvStemConfig(16, 3, 2), ConvStemConfig(16, 3, 2)]


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dropout": 0.2, "attention_dropout": 0.1},
        {"representation_size": 9},
        {"patch_size": 16},
        {"conv_stem_configs": stem()},
    ],
    ids=["plain", "dropout", "representation", "patches", "stem"],
)
def test_nothing_reduced_is_no_difference(changes: dict[str, Any], images: torch.Tensor) -> None:
    assert set(gaps(tiny(**changes), images)) == {0.0}


@pytest.mark.parametrize("train", [False, True])
def test_the_halves_of_a_block_are_the_block(train: bool) -> None:
    block = tiny(dropout=0.2, attention_dropout=0.1).train(train).encoder.layers[1]
    assert block_gap(block, torch.randn(3, 17, 32, requires_grad=True)) == 0.0


def test_signals_are_those_of_the_attention() -> None:
    attn = tiny().eval().encoder.layers[0].self_attention
    x = torch.randn(2, 17, 32)
    need = frozenset({"k", "v", "cls_row", "column", "attn"})
    out, found = attend(attn, x, prefix=1, need=need)
    expected, weights = attn(x, x, x, need_weights=True, average_attn_weights=False)
    assert torch.allclose(out, expected, atol=1e-6)
    seen = found.signals
    assert torch.allclose(seen.attn, weights, atol=1e-6)
    assert torch.allclose(seen.cls_row, weights[:, :, 0], atol=1e-6)
    assert torch.allclose(seen.column, weights.mean((1, 2)), atol=1e-6)
    _, k, v = nn.functional.linear(x, attn.in_proj_weight, attn.in_proj_bias).chunk(3, dim=-1)
    for got, want in ((seen.k, k), (seen.v, v)):
        assert torch.allclose(got.transpose(1, 2).flatten(2), want, atol=1e-6)


def test_maps_are_those_of_the_attention(images: torch.Tensor) -> None:
    model = tiny().eval()
    seen: list[torch.Tensor] = []
    layer = model.encoder.layers[0]
    layer.ln_1.register_forward_hook(lambda m, args, out: seen.append(out))
    with torch.no_grad():
        maps = zoo.attention_maps(model, images)
        weights = layer.self_attention(*[seen[0]] * 3, average_attn_weights=False)[1]
    assert len(maps) == 4
    assert torch.allclose(maps[0].weights, weights, atol=1e-6)


@pytest.mark.parametrize("name", ["tome", "evit", "topk", "ats", "dynamicvit", "tofu", "cropr"])
@pytest.mark.parametrize("changes", [{}, {"conv_stem_configs": stem()}], ids=["plain", "stem"])
def test_what_is_counted_is_what_runs(
    name: str, changes: dict[str, Any], images: torch.Tensor
) -> None:
    model = zoo.wrap(tiny(**changes), name).eval()
    with torch.no_grad():
        logits, info = model(images, return_info=True)
    assert logits.shape == (3, 7) and logits.isfinite().all()
    assert info.tokens == tuple(model.token_counts())
    assert zoo.profile(model).gmacs == pytest.approx(torch_gmacs(model, images[:1]), rel=1e-6)


def test_merged_duplicates_count_for_all_of_them() -> None:
    """Where every patch is the same, merging them changes nothing."""
    model = tiny().eval()
    model.encoder.pos_embedding.data.zero_()
    x = torch.randn(1, 3, 8, 8).repeat(1, 1, 4, 4)
    merged = zoo.wrap(model, "tome", R2).eval()
    with torch.no_grad():
        assert torch.allclose(merged(x), model(x), atol=1e-5)
        assert merged(x, return_info=True)[1].tokens[-1][1] == 9


def test_the_last_block_may_compute_the_class_token_alone(images: torch.Tensor) -> None:
    whole = zoo.wrap(tiny(), "tome", R2).eval()
    part = zoo.wrap(whole.unwrap(), "tome", R2, last_block="class_token").eval()
    with torch.no_grad():
        assert torch.allclose(whole(images), part(images), atol=1e-6)
    assert zoo.profile(part).gmacs < zoo.profile(whole).gmacs
    assert zoo.profile(part).gmacs == pytest.approx(torch_gmacs(part, images[:1]), rel=1e-6)


def test_it_trains_and_checkpoints(images: torch.Tensor) -> None:
    model = zoo.wrap(tiny(), "tome", R2).train()
    grads = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(images).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert len(grads[0]) == len(list(model.parameters()))


def test_timms_tools_know_it(images: torch.Tensor) -> None:
    model = zoo.wrap(tiny(representation_size=9), "tome", R2).eval()
    assert (model.num_classes, model.num_features, model.depth) == (7, 9, 4)
    with torch.no_grad():
        features = model.forward_features(images)
        assert torch.equal(model.forward_head(features), model(images))
        assert model.forward_head(features, pre_logits=True).shape == (3, 9)
        maps = model.forward_intermediates(images, 2, intermediates_only=True)
    assert [tuple(m.shape) for m in maps] == [(3, 32, 4, 4)] * 2
    assert "backbone.class_token" in model.no_weight_decay()
    model.reset_classifier(5)
    assert model(images).shape == (3, 5) and model.num_classes == 5
    model.reset_classifier(0)
    assert model(images).shape == (3, 9) and model.num_classes == 0


def test_a_head_that_somebody_replaced(images: torch.Tensor) -> None:
    m = tiny()
    m.heads = nn.Identity()
    model = zoo.wrap(m, "tome", R2).eval()
    assert model.num_classes == 0 and model(images).shape == (3, 32)


def test_hooks_see_what_torchvision_shows_them(images: torch.Tensor) -> None:
    m, seen = tiny().eval(), []
    attn = m.encoder.layers[1].self_attention
    attn.register_forward_hook(lambda a, args, out: seen.append((len(args), type(out), out[1])))
    model = zoo.wrap(m, "tome", R2).eval()
    with torch.no_grad():
        model(images)
        m(images)
    assert seen == [(3, tuple, None)] * 2


@pytest.mark.parametrize(
    "changes",
    [{"representation_size": 9, "dropout": 0.1}, {"conv_stem_configs": stem()}],
    ids=["representation", "stem"],
)
def test_saved_and_loaded_again(
    changes: dict[str, Any], tmp_path: Path, images: torch.Tensor
) -> None:
    model = zoo.wrap(tiny(**changes), "tome", R2).eval()
    save_pretrained(model, tmp_path / "m")
    again = zoo.load(tmp_path / "m")
    with torch.no_grad():
        assert torch.equal(again(images), model(images))
    assert again.recipe == model.recipe
    assert again.recipe["backbone"]["library"] == "torchvision"
    with torch.no_grad():
        assert zoo.load(tmp_path / "m", num_classes=3)(images).shape == (3, 3)


def test_what_is_refused_says_why(images: torch.Tensor) -> None:
    with pytest.raises(ZooError, match=r"expected images of shape \(B, 3, 32, 32\), got"):
        zoo.wrap(tiny(), "tome", R2)(torch.zeros(1, 3, 40, 40))
    odd = tiny()
    odd.encoder.layers[0].self_attention = nn.MultiheadAttention(32, 2)
    with pytest.raises(UnsupportedModel, match="batch_first=False"):
        zoo.wrap(odd, "tome")

    class Mine(Encoder):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input) + 1

    mine = tiny()
    mine.encoder.__class__ = Mine
    with pytest.raises(UnsupportedModel, match="encoder of the VisionTransformer is a Mine"):
        zoo.wrap(mine, "tome")

    class Other(VisionTransformer):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + 1

    with pytest.raises(UnsupportedModel, match="none of the models of|not supported"):
        zoo.wrap(Other(32, 8, 1, 2, 32, 48), "tome")


@pytest.mark.parametrize("plugin", ["cla", "clc", "clca", "tocom"])
def test_plugins_act_around_its_blocks(plugin: str, images: torch.Tensor) -> None:
    schedule = {"name": "constant_r", "r": 2}
    model = zoo.wrap(tiny(), "tome", schedule, [plugin])
    with torch.no_grad():
        assert model.eval()(images).shape == (3, 7)
    assert zoo.profile(model).gmacs == pytest.approx(torch_gmacs(model, images[:1]), rel=1e-6)
    names = dict(model.named_parameters())
    model.train()(images).square().sum().backward()
    idle = {name for name, p in names.items() if p.grad is None}
    assert idle <= model.unused_parameters() <= set(names)
    if plugin == "cla":
        assert {"backbone.encoder.ln.weight", "backbone.heads.head.weight"} <= idle


@pytest.mark.parametrize("plugin", ["clc", "tocom"])
def test_plugins_with_an_image_tower_of_open_clip(plugin: str) -> None:
    pytest.importorskip("open_clip")
    from open_clip.transformer import VisionTransformer as Tower

    tower = Tower(32, 8, 32, 4, 2, 2.0, output_dim=16)
    model = zoo.wrap(tower, "tome", {"name": "constant_r", "r": 2}, [plugin]).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert model(x).shape == (2, 16)
    assert zoo.profile(model).gmacs == pytest.approx(torch_gmacs(model, x[:1]), rel=1e-6)
    with pytest.raises(ZooError, match="has no classes"):
        zoo.wrap(tower, "tome", None, ["cla"])
