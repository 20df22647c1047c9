"""Whatever arguments build a model, the folder that is saved builds it again."""

from __future__ import annotations

import inspect
import warnings
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer

import zoo
from zoo.build import CONSUMED_ARGS
from zoo.checkpoint import read_config, save_pretrained
from zoo.errors import ZooError
from zoo.models.jumbo_model import Jumbo
from zoo.models.lookupvit import LookupViT

SMALL = {"img_size": 32, "depth": 2, "embed_dim": 24, "num_heads": 2, "num_classes": 5}
MODELS: dict[str, tuple[type, dict[str, Any]]] = {
    "vit_tiny_patch16_224": (VisionTransformer, {"patch_size": 8}),
    "eva02_tiny_patch14_224": (Eva, {"patch_size": 8}),
    "jumbo_tiny_patch16_224": (Jumbo, {"patch_size": 8}),
    "lookupvit_tiny_patch16_224": (LookupViT, {"patch_size": 8, "compressed_grid": 2}),
}
# What people give. Arguments that are not listed are given as their default, and switches flipped.
VALUES: dict[str, list[Any]] = {
    "img_size": [48, (32, 48), [48, 32]],
    "patch_size": [4, (8, 8), [8, 16]],
    "in_chans": [1, 4],
    "num_classes": [0, 1, 11],
    "global_pool": ["token", "avg", "avgmax", "max", "map", "jumbo", ""],
    "mlp_ratio": [2, 2.5],
    "init_values": [None, 1e-5],
    "pos_embed": ["learn", "none", ""],
    "reg_tokens": [0, 3],
    "num_reg_tokens": [2],
    "fc_norm": [None, True, False],
    "use_fc_norm": [None, True, False],
    "use_post_transformer_norm": [None, True],
    "weight_init": ["", "skip", "jax", "moco", "reset"],
    "norm_layer": ["layernorm", "rmsnorm", None],
    "embed_norm_layer": ["layernorm"],
    "act_layer": ["gelu", "silu", "gelu_tanh", "relu", None],
    "attn_layer": ["attn", "diff"],
    "attn_type": ["eva", "rope"],
    "embed_layer": ["patch_embed"],
    "mlp_layer": ["mlp"],
    "block_fn": ["block"],
    "drop_path_rate": [0.1, 0],
    "patch_drop_rate": [0.0, 0.25],
    "rope_type": ["cat", "mixed", "dinov3"],
    "rope_temperature": [100.0],
    "ref_feat_shape": [(2, 2), None],
    "num_kv_heads": [2, None],
    "attn_pool_num_heads": [2],
    "jumbo_tokens": [1, 4],
    "jumbo_mlp": ["shared", "unshared", "none"],
    "jumbo_lora": [0, 2],
    "compressed_grid": [3, (2, 3), [3, 2]],
    "head_mode": ["avg", "compressed", "lookup"],
    "norm_placement": ["pre", "post"],
    # Of timm.create_model itself.
    "scriptable": [True],
    "exportable": [True, None],
    "no_jit": [True],
    "cache_dir": ["somewhere"],
    "pretrained_cfg": ["", {"num_classes": 5, "input_size": (3, 32, 32)}],
    "pretrained_cfg_overlay": [{"mean": (0.1, 0.2, 0.3)}, {"input_size": (1, 48, 48)}],
    "device": ["cpu", torch.device("cpu")],
    "dtype": [torch.float32],
}
FACTORY = ("scriptable", "exportable", "no_jit", *sorted(CONSUMED_ARGS))
GIVEN_BY_ALL = ("args", "kwargs", "depth", "embed_dim", "num_heads", "pretrained")


def cases() -> list[tuple[str, str, Any]]:
    found = []
    for name, (cls, _) in MODELS.items():
        defaults = {k: p.default for k, p in inspect.signature(cls).parameters.items()}
        for key in (*defaults, *(k for k in FACTORY if k not in defaults)):
            if key in GIVEN_BY_ALL or (key in FACTORY and key not in VALUES):
                continue
            default = defaults.get(key)
            usual = [not default] if isinstance(default, bool) else [default]
            usual = [v for v in usual if v is None or isinstance(v, bool | int | float | str)]
            found += [(name, key, value) for value in VALUES.get(key, usual)]
    return found


CASES = cases()
# The usual run tries the arguments of one family.
MARKED = [
    pytest.param(*case, marks=[] if case[0] == next(iter(MODELS)) else pytest.mark.slow)
    for case in CASES
]


def build(name: str, **args: Any) -> Any:
    torch.manual_seed(0)
    return zoo.create_model(name, **{**SMALL, **MODELS[name][1], **args}).eval()


def images(model: Any) -> torch.Tensor:
    embed = model.backbone.patch_embed
    return torch.rand(2, embed.proj.in_channels, *embed.img_size)


@pytest.mark.parametrize(("name", "key", "value"), MARKED, ids=lambda v: str(v)[:24])
def test_an_argument_survives(tmp_path: Path, name: str, key: str, value: Any) -> None:
    try:
        model = build(name, **{key: value})
    except ZooError as error:
        assert "\n" not in str(error)
        return  # not accepted in the first place; see the next test
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        folder = save_pretrained(model, tmp_path / "model")
        loaded = zoo.load(folder)
    assert not CONSUMED_ARGS & set(read_config(folder)["backbone"]["args"])
    x = images(model)
    with torch.no_grad():  # without initialisation a model may answer NaN
        torch.testing.assert_close(loaded(x), model(x), rtol=0, atol=0, equal_nan=True)


def test_most_arguments_are_accepted() -> None:
    """So that the test above is not one of refusals."""

    def accepted(name: str, key: str, value: Any) -> bool:
        try:
            build(name, **{key: value})
        except ZooError:
            return False
        return True

    plain = [case for case in CASES if case[0] == "vit_tiny_patch16_224"]
    refused = [(key, value) for n, key, value in plain if not accepted(n, key, value)]
    assert {key for key, _ in refused} <= {
        "global_pool", "class_token", "attn_layer", "embed_layer", "mlp_layer", "block_fn"
    }  # fmt: skip
    assert len(refused) < len(plain) / 4


@pytest.mark.parametrize(
    "how", ["checkpoint_path", "overlay", "overlay of another size", "pretrained_cfg"]
)
def test_weights_of_a_local_file_are_used_up(tmp_path: Path, how: str) -> None:
    torch.manual_seed(3)
    source = timm.create_model("vit_tiny_patch16_224", **SMALL)
    file = str(tmp_path / "w.safetensors")
    save_file(source.state_dict(), file)
    described = {"file": file, "num_classes": 5, "input_size": (3, 32, 32), "custom_load": False}
    small: dict[str, Any] = {k: v for k, v in SMALL.items() if k != "img_size"}
    args: dict[str, Any] = {
        "checkpoint_path": {"checkpoint_path": file, "img_size": 32},
        "overlay": {"pretrained": True, "pretrained_cfg_overlay": described},
        "overlay of another size": {
            "pretrained": True, "pretrained_cfg_overlay": described, "img_size": 48
        },
        "pretrained_cfg": {
            "pretrained": True,
            "pretrained_cfg": {**described, "architecture": "vit_tiny_patch16_224",
                               "classifier": "head", "fixed_input_size": True},
        },
    }[how]  # fmt: skip
    model = zoo.create_model("vit_tiny_patch16_224", "topk", **small, **args).eval()
    assert torch.equal(model.backbone.blocks[1].mlp.fc2.weight, source.blocks[1].mlp.fc2.weight)
    assert model.backbone.patch_embed.img_size == ((48, 48) if "another" in how else (32, 32))
    # They are not the weights that timm publishes under its tag.
    assert model.recipe["backbone"]["tag"] is None
    folder = save_pretrained(model, tmp_path / "model")
    Path(file).unlink()
    loaded, x = zoo.load(folder), images(model)
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))


def test_a_file_that_is_not_there_is_one_line() -> None:
    with pytest.raises(ZooError, match="timm cannot build 'test_vit' with .*nowhere") as caught:
        zoo.create_model("test_vit", checkpoint_path="nowhere.pth")
    assert "\n" not in str(caught.value)
    with pytest.raises(ZooError, match="timm cannot load the weights of 'test_vit'"):
        overlay = {"file": "nowhere.pth"}
        zoo.create_model("test_vit", pretrained=True, pretrained_cfg_overlay=overlay)


def test_what_loading_does_not_take() -> None:
    with pytest.raises(ZooError, match="it has no checkpoint_path"):
        zoo.load("vit_digits", checkpoint_path="other.pth")


# ------------------------------------------------------------------------------ tags of weights


def test_a_model_from_scratch_has_no_tag(tmp_path: Path) -> None:
    for name in ("vit_tiny_patch16_224", "vit_tiny_patch16_224.augreg_in21k"):
        model = zoo.create_model(name, "tome", **SMALL)
        assert model.recipe["backbone"]["tag"] is None
        assert zoo.wrap(model.unwrap(), None).recipe["backbone"]["tag"] is None
        with torch.no_grad():  # trained since
            for p in model.parameters():
                p.add_(0.01)
        assert zoo.wrap(model.unwrap(), "topk").recipe["backbone"]["tag"] is None
        loaded = zoo.load(save_pretrained(model, tmp_path / name))
        assert loaded.recipe == model.recipe
    # timm writes its tag into models without weights, too.
    assert zoo.wrap(timm.create_model("test_vit"), "tome").recipe["backbone"]["tag"] is None


def test_pretrained_weights_keep_their_tag(tmp_path: Path) -> None:
    trained = timm.create_model("test_vit.r160_in1k")
    with torch.no_grad():
        trained.blocks[0].norm1.weight.mul_(1.01)
    model = zoo.wrap(trained, "tome")
    assert model.recipe["backbone"]["tag"] == "r160_in1k"
    loaded = zoo.load(save_pretrained(model, tmp_path / "model"))
    assert loaded.recipe["backbone"]["tag"] == "r160_in1k"
    # A recipe alone names the weights to fetch, also where the model never had them.
    scratch = zoo.create_model("test_vit.r160_in1k", "tome")
    folder = save_pretrained(scratch, tmp_path / "recipe", weights=False)
    assert read_config(folder)["backbone"]["tag"] == "r160_in1k"
