"""The official sizes of Jumbo and a tiny one for digits, registered with timm.

The model itself is in `zoo.models.jumbo_model`.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import build_sincos2d_pos_embed
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from zoo.models.jumbo_model import DenseFeatures, Jumbo, checkpoint_filter_fn
from zoo.models.vit_digits import MEAN, STD

__all__ = ["DenseFeatures", "Jumbo", "checkpoint_filter_fn"]

_HUB = "https://huggingface.co/antofuller/jumbo/resolve/main/"


def _cfg(file: str) -> dict[str, Any]:
    return {
        "url": _HUB + file,  # timm reads an address with weights_only=True in all its versions
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "fixed_input_size": True,
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "mit",
        "origin_url": "https://github.com/antofuller/jumbo",
        "paper_ids": "arXiv:2502.15021",
    }


default_cfgs = generate_default_cfgs(
    {
        **{
            f"jumbo_{size}_patch16_224.in1k": _cfg(f"jumbo_{size}.pth")
            for size in ("pico", "nano", "tiny", "small", "base")
        },
        "jumbo_digits": {
            "num_classes": 10,
            "input_size": (1, 16, 16),
            "pool_size": None,
            "fixed_input_size": True,
            "mean": (MEAN,),
            "std": (STD,),
            "crop_pct": 1.0,
            "interpolation": "bilinear",
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
)


def _create(variant: str, pretrained: bool, defaults: dict[str, Any], given: Any) -> Jumbo:
    out_indices = given.pop("out_indices", 3)
    return build_model_with_cfg(
        Jumbo,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": out_indices, "feature_cls": "getter"},
        **{**defaults, **given},
    )


@register_model
def jumbo_pico_patch16_224(pretrained: bool = False, **kwargs: Any) -> Jumbo:
    """Jumbo-Pico: width 96, 3 heads, J 6."""
    args = {"embed_dim": 96, "num_heads": 3, "jumbo_tokens": 6}
    return _create("jumbo_pico_patch16_224", pretrained, args, kwargs)


@register_model
def jumbo_nano_patch16_224(pretrained: bool = False, **kwargs: Any) -> Jumbo:
    """Jumbo-Nano: width 128, 4 heads, J 6."""
    args = {"embed_dim": 128, "num_heads": 4, "jumbo_tokens": 6}
    return _create("jumbo_nano_patch16_224", pretrained, args, kwargs)


@register_model
def jumbo_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> Jumbo:
    """Jumbo-Tiny: width 192, 3 heads, J 6."""
    args = {"embed_dim": 192, "num_heads": 3, "jumbo_tokens": 6}
    return _create("jumbo_tiny_patch16_224", pretrained, args, kwargs)


@register_model
def jumbo_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> Jumbo:
    """Jumbo-Small: width 384, 6 heads, J 6."""
    args = {"embed_dim": 384, "num_heads": 6, "jumbo_tokens": 6}
    return _create("jumbo_small_patch16_224", pretrained, args, kwargs)


@register_model
def jumbo_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> Jumbo:
    """Jumbo-Base: width 768, 12 heads, J 3."""
    args = {"embed_dim": 768, "num_heads": 12, "jumbo_tokens": 3}
    return _create("jumbo_base_patch16_224", pretrained, args, kwargs)


@register_model
def jumbo_digits(pretrained: bool = False, **kwargs: Any) -> Jumbo:
    """A tiny Jumbo for 16x16 grey digits, to train offline; of this project, without weights."""
    args = {
        "img_size": 16,
        "patch_size": 2,
        "in_chans": 1,
        "num_classes": 10,
        "embed_dim": 64,
        "depth": 6,
        "num_heads": 2,
        "mlp_ratio": 4,
        "jumbo_tokens": 4,
        # So narrow a model learns much sooner from wider weights than from the official ones.
        "weight_init": "jax",
        "drop_path_rate": 0.0,
    }
    model = _create("jumbo_digits", pretrained, args, kwargs)
    if not pretrained:
        _start_from_waves(model)
    return model


def _start_from_waves(model: Jumbo) -> None:
    """Start the learned positions from sines and cosines, as `vit_digits` does.

    From near zero a model with so few images to learn from sees a bag of patches for long.
    """
    table = model.pos_embed
    if table is None or model.embed_dim % 4 or table.is_meta:
        return
    with torch.no_grad():
        table.copy_(build_sincos2d_pos_embed(list(model.pos_grid), model.embed_dim))
