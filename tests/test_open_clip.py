"""open_clip's image towers, its own and those of timm, alone and inside a whole CLIP."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zoo
from tests.towers import block_gap, flat, gaps, shaken
from zoo.checkpoint import save_pretrained
from zoo.cost.counters import torch_gmacs
from zoo.data.checks import data_config
from zoo.errors import UnsupportedModel, ZooError

pytest.importorskip("open_clip")

from open_clip import CLIP, CoCa, CustomTextCLIP  # noqa: E402
from open_clip.coca_model import MultimodalCfg  # noqa: E402
from open_clip.model import CLIPTextCfg, CLIPVisionCfg, set_model_preprocess_cfg  # noqa: E402
from open_clip.modified_resnet import ModifiedResNet  # noqa: E402
from open_clip.timm_model import TimmModel  # noqa: E402
from open_clip.transformer import LayerNormFp32, QuickGELU, VisionTransformer  # noqa: E402

R2 = {"name": "constant_r", "r": 2}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "average": {"pool_type": "avg"},
    "average, norm behind it": {"pool_type": "avg", "final_ln_after_pool": True},
    "class token, norm behind it": {"final_ln_after_pool": True},
    "all tokens": {"pool_type": "none"},
    "scale": {"ls_init_value": 0.1, "act_layer": QuickGELU, "no_ln_pre": True},
    "pooler": {"attentional_pool": True},
    "pooler, parallel": {"attentional_pool": "parallel", "output_dim": 32},
    "pooler, cascade": {"attentional_pool": "cascade", "output_dim": 32},
    "pair": {"output_tokens": True},
    "patch dropout": {"patch_dropout": 0.3},
    "own attention": {"qk_norm": True},
    "scales and norms": dict.fromkeys(
        ("scale_heads", "scale_attn", "scale_attn_inner", "scale_fc"), True
    ),
    "sines": {"pos_embed_type": "sin_cos_2d"},
    "norm in float32": {"norm_layer": LayerNormFp32},
    "oblong": {"image_size": (24, 32), "patch_size": (8, 4)},
}
TEXT = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 2}
VISION = {"layers": 3, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 32}
TRUNK = {"timm_model_name": "test_vit", "timm_pool": "token", "image_size": 160}
MAP = {"timm_model_name": "test_vit3", "timm_pool": "map", "image_size": 160}


def tiny(**changes: Any) -> VisionTransformer:
    usual = {
        "image_size": 32,
        "patch_size": 8,
        "width": 32,
        "layers": 4,
        "heads": 2,
        "mlp_ratio": 1.5,
        "output_dim": 24,
        "attn_pooler_heads": 2,
        "attn_pooler_queries": 5,
    }
    return shaken(VisionTransformer(**{**usual, **changes}))  # type: ignore[return-value]


def pictures(tower: Any) -> Tensor:
    g = torch.Generator().manual_seed(0)
    return torch.randn(3, 3, *tower.image_size, generator=g)


def clip(kind: str, width: int = 16) -> Any:
    cls = CLIP if kind == "CLIP" else CustomTextCLIP
    vision = {"timm": TRUNK, "map": MAP}.get(kind, VISION)
    return shaken(cls(width, dict(vision), dict(TEXT))).eval()


@pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS)
def test_nothing_reduced_is_no_difference(changes: dict[str, Any]) -> None:
    tower = tiny(**changes)
    assert set(gaps(tower, pictures(tower))) == {0.0}


@pytest.mark.parametrize("kind", ["plain", "scale", "own attention", "scales and norms"])
def test_the_halves_of_a_block_are_the_block(kind: str) -> None:
    block = tiny(**KINDS[kind]).transformer.resblocks[1]
    assert block_gap(block, torch.randn(3, 17, 32, requires_grad=True)) == 0.0


@pytest.mark.parametrize("name", ["tome", "evit", "ats"])
@pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS)
def test_what_is_counted_is_what_runs(name: str, changes: dict[str, Any]) -> None:
    tower = tiny(**changes)
    model, x = zoo.wrap(tower, name).eval(), pictures(tower)
    with torch.no_grad():
        answer, info = model(x, return_info=True)
    assert flat(answer).isfinite().all() and info.tokens[-1][1] < info.tokens[0][0]
    assert zoo.profile(model).gmacs == pytest.approx(torch_gmacs(model, x[:1]), rel=1e-6)
    if changes.get("pool_type") != "none":
        with torch.no_grad():
            dense = tower(x)
        first = (answer, dense) if isinstance(dense, Tensor) else (answer[0], dense[0])
        assert first[0].shape == first[1].shape


@pytest.mark.parametrize(
    "kind", ["plain", "average", "pooler", "pooler, parallel", "pooler, cascade"]
)
def test_merged_duplicates_count_for_all_of_them(kind: str) -> None:
    """Where every patch is the same, merging them changes nothing, whatever pools them."""
    tower = tiny(**KINDS[kind]).eval()
    tower.positional_embedding.data.zero_()
    x = torch.randn(2, 3, 8, 8).repeat(1, 1, 4, 4)
    merged = zoo.wrap(tower, "tome", R2).eval()
    with torch.no_grad():
        assert torch.allclose(merged(x), tower(x), rtol=1e-4, atol=1e-4)
        features = merged.forward_features(x)
        assert torch.allclose(merged.forward_head(features), merged(x), atol=1e-6)


def test_the_last_block_may_compute_the_class_token_alone() -> None:
    x = pictures(tiny())
    whole = zoo.wrap(tiny(), "tome", R2).eval()
    part = zoo.wrap(tiny(), "tome", R2, last_block="class_token").eval()
    with torch.no_grad():
        assert torch.allclose(whole(x), part(x), atol=1e-6)
    for kind, reason in (("average", "pool_type='avg'"), ("pooler", "pooler"), ("pair", "tokens")):
        with pytest.raises(ZooError, match=reason):
            zoo.wrap(tiny(**KINDS[kind]), "tome", R2, last_block="class_token")


@pytest.mark.parametrize("kind", ["CLIP", "text apart", "timm", "map"])
def test_a_whole_model_goes_on_with_a_wrapped_tower(kind: str) -> None:
    model = clip(kind)
    x, text = pictures(model.visual), torch.randint(1, 50, (3, 8))

    def all_of_it() -> list[Tensor]:
        with torch.no_grad():
            maps = model.forward_intermediates(
                x, text, image_output_extra_tokens=True, normalize_intermediates=True
            )
            return [
                model.encode_image(x, normalize=True),
                model.encode_text(text),
                *model(x, text),
                *(flat(maps[key]) for key in sorted(maps)),
            ]

    before, tower = all_of_it(), model.visual
    model.visual = zoo.wrap(tower, None).eval()
    assert all(torch.equal(a, b) for a, b in zip(before, all_of_it(), strict=True))
    model.visual = zoo.wrap(tower, "tome", R2).eval()
    after = all_of_it()
    assert [a.shape for a in after] == [b.shape for b in before]
    assert torch.equal(after[1], before[1]) and not torch.equal(after[0], before[0])
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other.encode_image(x), model.encode_image(x))
    assert model.visual.image_size == tower.image_size
    if kind in ("CLIP", "text apart"):
        assert "visual.backbone.class_embedding" in model.no_weight_decay()
        model.set_grad_checkpointing()
        model.encode_image(x).sum().backward()
        model.lock_image_tower()
        assert not any(p.requires_grad for p in model.visual.parameters())


def test_a_captioner_reads_the_tokens_of_its_pooler() -> None:
    vision = CLIPVisionCfg(
        **VISION,
        attentional_pool=True,
        attn_pooler_heads=2,
        attn_pooler_queries=5,
        output_tokens=True,
    )
    decoder = MultimodalCfg(width=32, heads=2, layers=2, context_length=8)
    text = CLIPTextCfg(**TEXT, embed_cls=True, output_tokens=True)
    model = shaken(CoCa(32, decoder, text, vision)).eval()
    x, words = pictures(model.visual), torch.randint(1, 50, (3, 8))
    with torch.no_grad():
        before, tower = model(x, words), model.visual
        model.visual = zoo.wrap(tower, None).eval()
        assert torch.equal(model(x, words)["logits"], before["logits"])
        model.visual = zoo.wrap(tower, "tome", R2).eval()
        assert model(x, words)["logits"].shape == before["logits"].shape


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("kind", ["plain", "class token, norm behind it", "average"])
def test_features_of_blocks_are_open_clips(kind: str, norm: bool) -> None:
    tower = tiny(**KINDS[kind]).eval()
    x = pictures(tower)
    options = {"indices": [1, 3], "normalize_intermediates": norm, "output_extra_tokens": True}
    with torch.no_grad():
        expected = tower.forward_intermediates(x, **options)
        found = zoo.wrap(tower, None).eval().forward_intermediates(x, **options)
        assert found.keys() == expected.keys()
        assert all(torch.equal(flat(found[key]), flat(expected[key])) for key in expected)
        fewer = zoo.wrap(tower, "tome", R2).eval().forward_intermediates(x, **options)
    assert [m.shape for m in fewer["image_intermediates"]] == [(3, 32, 4, 4)] * 2


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "norm in float32"])
def test_saved_and_loaded_again(kind: str, tmp_path: Path) -> None:
    model = zoo.wrap(tiny(**KINDS[kind]), "tome", R2).eval()
    x = pictures(model.unwrap())
    save_pretrained(model, tmp_path / "m")
    again = zoo.load(tmp_path / "m")
    with torch.no_grad():
        assert torch.equal(flat(again(x)), flat(model(x)))
    assert again.recipe["backbone"]["library"] == "open_clip"


def test_what_a_tower_says_of_its_images_is_saved(tmp_path: Path) -> None:
    whole = clip("CLIP")
    own = {"mean": (0.5, 0.4, 0.3), "std": (0.2,) * 3, "resize_mode": "squash"}
    set_model_preprocess_cfg(whole, own)
    model = zoo.wrap(whole.visual, "tome", R2)
    save_pretrained(model, tmp_path / "m")
    for config in (data_config(model), data_config(zoo.load(tmp_path / "m"))):
        assert config["mean"] == (0.5, 0.4, 0.3) and config["std"] == (0.2,) * 3
        assert config["crop_mode"] == "squash" and config["crop_pct"] == 1.0


@pytest.mark.parametrize("kind", ["timm", "map"])
@pytest.mark.parametrize("proj", ["linear", "mlp", "none", ""])
def test_a_trunk_of_timm(kind: str, proj: str, tmp_path: Path) -> None:
    vision = {"timm": TRUNK, "map": MAP}[kind]
    tower = shaken(TimmModel(vision["timm_model_name"], 16, 160, vision["timm_pool"], proj))
    x = pictures(tower)[:2]
    assert set(gaps(tower, x)) == {0.0}
    model = zoo.wrap(tower, "tome", R2).eval()
    assert zoo.profile(model).gmacs == pytest.approx(torch_gmacs(model, x[:1]), rel=1e-6)
    save_pretrained(model, tmp_path / "m")
    with torch.no_grad():
        assert torch.equal(zoo.load(tmp_path / "m")(x), model(x))


def test_what_is_refused_says_why() -> None:
    with pytest.raises(UnsupportedModel, match=r"model.visual = zoo.wrap\(model.visual"):
        zoo.wrap(clip("CLIP"), "tome")
    with pytest.raises(UnsupportedModel, match="image towers VisionTransformer and TimmModel"):
        zoo.wrap(ModifiedResNet([1, 1, 1, 1], 16, 2, 32, 8), "tome")
    with pytest.raises(UnsupportedModel, match="timm trunk of this open_clip tower: .*ConvNeXt"):
        zoo.wrap(TimmModel("test_convnext", 16, 160), "tome")
    with pytest.raises(UnsupportedModel, match="scaled cosine"):
        zoo.wrap(tiny(scaled_cosine_attn=True), "tome")
    with pytest.raises(ZooError, match=r"expected images of shape \(B, 3, 32, 32\), got"):
        zoo.wrap(tiny(), "tome", R2)(torch.zeros(1, 3, 40, 40))
    with pytest.raises(ZooError, match=r"expected images of shape"):
        zoo.wrap(tiny(), "tome", R2)(torch.zeros(3, 32, 32))
    odd = tiny()
    odd.transformer.resblocks[2].attn = nn.MultiheadAttention(32, 2)
    with pytest.raises(UnsupportedModel, match="batch_first=False"):
        zoo.wrap(odd, "tome")
    with pytest.raises(ZooError, match="has no classifier"):
        zoo.wrap(tiny(), "tome").reset_classifier(10)


@pytest.mark.parametrize("kind", ["CLIP", "text apart", "timm"])
def test_a_whole_model_is_reduced_in_place(kind: str) -> None:
    model = clip(kind)
    x, text = pictures(model.visual), torch.randint(1, 50, (3, 8))
    names = list(model.state_dict())
    with torch.no_grad():
        before = model(x, text)
        wrapped = zoo.wrap(copy.deepcopy(model.visual), "tome", R2).eval()
        assert zoo.attach(model, "tome", R2) is model
        assert torch.equal(model.encode_image(x), wrapped(x))
        assert torch.equal(model(x, text)[1], before[1])
        maps = model.forward_intermediates(x, image_indices=[1])["image_intermediates"]
        expected = wrapped.forward_intermediates(x, indices=[1])["image_intermediates"]
        assert torch.equal(maps[0], expected[0])
        assert list(model.state_dict()) == names
        zoo.detach(model)
        assert torch.equal(model(x, text)[0], before[0])
