"""Embeddings that come apart into patches and positions, and the pixels of patches."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import zoo
from tests.cases import backbone
from tests.families import FAMILIES, TINY, family
from zoo.adapters.hollow import hollow
from zoo.adapters.tower import tower_of
from zoo.cost.counters import torch_gmacs
from zoo.errors import UnsupportedModel, ZooError

CTS = {"name": "cts"}
R6 = {"name": "constant_r", "r": 6}


def torchvision(**changes: Any) -> nn.Module:
    vision = pytest.importorskip("torchvision.models.vision_transformer")
    own = dict(image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=48)
    return vision.VisionTransformer(**own, **changes)  # type: ignore[no-any-return]


def open_clip(**changes: Any) -> nn.Module:
    inner = pytest.importorskip("open_clip.transformer")
    own = dict(image_size=(32, 48), patch_size=8, width=32, layers=2, heads=2, mlp_ratio=2.0)
    return inner.VisionTransformer(**own, **changes)  # type: ignore[no-any-return]


def hugging_face(name: str) -> nn.Module:
    pytest.importorskip("transformers", minversion="5.0")
    from tests import hf_cases

    return hf_cases.model(name)  # type: ignore[no-any-return]


HF = ["vit-head", "deit", "ijepa", "mae", "dinov2-head", "registers", "dinov3", "clip", "siglip"]
HF += ["siglip2", "beit", "beit-head"]
OTHERS = ("beit", "beit_shared", "relpos_class", "things")
MODELS: dict[str, Callable[[], nn.Module]] = {
    **{name: partial(backbone, name) for name in ("plain", "registers", "eva02", "jumbo")},
    **{n: partial(family, n) for n in FAMILIES if n.startswith("naflex") or n in OTHERS},
    "torchvision": torchvision,
    "open_clip": open_clip,
    **{f"hf-{name}": partial(hugging_face, name) for name in HF},
}


def pictures(m: Any, *size: int, batch: int = 2) -> Tensor:
    own = tower_of(m).input_size(m)
    generator = torch.Generator().manual_seed(3)
    return torch.randn(batch, own[0], *(size or own[1:]), generator=generator)


def embedded(m: Any, x: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Patches as a backbone embeds them, and as they come of its pieces."""
    tower = tower_of(m)
    grid = tower.grid_of(m, x, **options)
    with torch.no_grad():
        whole = tower.embed(m, x, **options).x[:, tower.prefix(m) :]
        pixels = tower.raster(m, x, grid, **options)
        return whole, tower.patches(m, pixels) + tower.positions(m, grid)


@pytest.mark.parametrize("name", MODELS)
def test_patches_and_positions_are_the_embedding(name: str) -> None:
    m = MODELS[name]().eval()
    assert tower_of(m).why_one_piece(m) == ""
    whole, pieces = embedded(m, pictures(m))
    assert torch.allclose(whole, pieces, atol=1e-5)
    # And the method that needs them runs, at the cost that is counted.
    model = zoo.wrap(m, CTS, R6).eval()
    with torch.no_grad():
        _, info = model(pictures(m), return_info=True)
    assert info.tokens[0][0] == model.prefix + model.anatomy.patches - 6
    if name != "hf-siglip2":  # looks at its shapes; the counter has no data
        x = pictures(m, batch=1)
        assert zoo.profile(model).gmacs == pytest.approx(torch_gmacs(model, x), rel=1e-4)


@pytest.mark.parametrize(
    ("name", "size", "options"),
    [
        ("naflex", (20, 32), {}),
        ("naflex_gap", (20, 12), {}),
        ("naflex_mixed", (16, 28), {}),
        ("hf-vit-head", (40, 24), {"interpolate_pos_encoding": True}),
        ("hf-clip", (43, 24), {"interpolate_pos_encoding": True}),
        ("hf-siglip", (24, 31), {"interpolate_pos_encoding": True}),
        ("hf-deit", (16, 48), {"interpolate_pos_encoding": True}),
        ("hf-dinov2-head", (45, 24), {}),
        ("hf-dinov3", (16, 40), {}),
        ("hf-siglip2", (24, 50), {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_they_are_at_other_image_sizes(
    name: str, size: tuple[int, int], options: dict[str, Any]
) -> None:
    m = MODELS[name]().eval()
    whole, pieces = embedded(m, pictures(m, *size), **options)
    assert torch.allclose(whole, pieces, atol=1e-5)
    model = zoo.wrap(m, {"name": "apt", "thresholds": [9.0]}, R6).eval()
    with torch.no_grad():
        _, info = model(pictures(m, *size), return_info=True, **options)
    assert info.tokens[0][0] < model.prefix + whole.shape[1]


def test_convolutional_and_padding_embeddings_of_naflex() -> None:
    for own in ({"embed_proj_type": "conv"}, {"input_norm_layer": nn.LayerNorm}):
        m = family("naflex", **own)
        whole, pieces = embedded(m, pictures(m))
        assert torch.allclose(whole, pieces, atol=1e-5)
    m = family("naflex", dynamic_img_pad=True)
    # In cells of several patches, padding must be as the embedding pads.
    whole, pieces = embedded(m, pictures(m, 22, 13))
    assert torch.allclose(whole, pieces, atol=1e-5)


@pytest.mark.parametrize("method", ["pixelprune", "rlt", "apt", "cts"])
def test_margin_and_padding_are_no_patches(method: str) -> None:
    """A margin changes nothing; what is padded is what padded images are."""
    args = {"pixelprune": {"threshold": 0.6, "metric": "mae", "mean": 0.0}, "rlt": {"frames": 2}}
    args |= {"rlt": {"frames": 2, "threshold": 1.1}, "apt": {"thresholds": [5.8]}}
    reducer = {"name": method, **args.get(method, {})}
    options = {**TINY, "img_size": 16, "dynamic_img_size": True, "dynamic_img_pad": True}
    torch.manual_seed(0)
    padding = VisionTransformer(**options)
    x = pictures(padding, 14, 15)
    model = zoo.wrap(padding, reducer, R6).eval()
    with torch.no_grad():
        padded = nn.functional.pad(x, (0, 1, 0, 2))
        assert torch.equal(model(x), model(padded))
    m: Any = hugging_face("dinov2")
    x = pictures(m, 23, 31)
    model = zoo.wrap(m, reducer, {"name": "constant_r", "r": 1}).eval()
    with torch.no_grad():
        ours, cut = model(x), model(x[:, :, :16, :24])
    assert torch.allclose(ours.pooler_output, cut.pooler_output, atol=1e-5)


@pytest.mark.parametrize("method", ["pixelprune", "apt", "cts"])
def test_siglip_2_is_given_patches_or_images(method: str) -> None:
    m: Any = hugging_face("siglip2")
    tower: Any = tower_of(m)
    x = pictures(m, 32, 48)
    patches, shapes = tower._cut(m, x)
    assert torch.equal(tower.raster(m, patches, (4, 6)), x)
    reducer = {"name": method, **({"threshold": 1.7} if method == "pixelprune" else {})}
    model = zoo.wrap(m, reducer, R6).eval()
    with torch.no_grad():
        given = model(patches, torch.ones(2, 24), shapes).pooler_output
        assert torch.allclose(given, model(x).pooler_output, atol=1e-6)


@pytest.mark.parametrize("method", ["apt", "cts"])
def test_a_stem_of_layers_is_refused_when_the_model_is_built(method: str) -> None:
    with hollow():
        hybrid = timm.create_model("vit_tiny_r_s16_p8_224", img_size=64)
    with pytest.raises(UnsupportedModel, match=f"'{method}' makes tokens .* a convolutional stem"):
        zoo.wrap(hybrid, method)
    layers = pytest.importorskip("torchvision.models.vision_transformer").ConvStemConfig
    stem = [layers(8, 3, 8), layers(16, 3, 1)]
    with pytest.raises(ZooError, match="a convolutional stem"):
        zoo.wrap(torchvision(conv_stem_configs=stem), method)


@pytest.mark.parametrize("name", ["beit", "relpos_class", "naflex"])
def test_an_open_clip_tower_asks_its_trunk(name: str) -> None:
    """A trunk with a bias for positions keeps it when tokens are gone."""
    TimmModel = pytest.importorskip("open_clip.timm_model").TimmModel
    tower = TimmModel("test_vit", 16, 160, "token", "linear").eval()
    tower.trunk = family(name)
    tower.head = nn.Linear(5, 16)
    x = pictures(tower)
    schedule = {"name": "keep_rate", "rate": 0.5, "blocks": [1]}
    with torch.no_grad():
        for reducer in ("tome", "cts", "adavit"):
            alone = zoo.wrap(tower.trunk, reducer, schedule).eval()
            torch.manual_seed(0)
            held = zoo.wrap(tower, reducer, schedule).eval()
            if reducer == "adavit":
                held.reducer.load_state_dict(alone.reducer.state_dict())
            assert torch.allclose(held(x), tower.head(alone(x)), atol=1e-6), reducer
        assert torch.equal(zoo.wrap(tower, None).eval()(x), tower(x))
