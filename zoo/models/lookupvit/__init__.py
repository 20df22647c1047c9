"""LookupViT: a cheap stream of many lookup tokens beside an expensive one of few compressed tokens.

Koner et al., "LookupViT: Compressing visual information to a limited number of tokens", ECCV 2024,
arXiv 2407.12753. There is neither official code nor are there weights; docs/models/lookupvit.md
says which details are the paper's and which are reconstructed or ours.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import build_sincos2d_pos_embed
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from zoo.models.lookupvit.layers import LookupBlock, Streams, resize_grid, resize_matrix
from zoo.models.lookupvit.model import LookupViT
from zoo.models.lookupvit.warm import checkpoint_filter_fn, warm_start
from zoo.models.vit_digits import MEAN, STD

__all__ = [
    "LookupBlock",
    "LookupViT",
    "Streams",
    "checkpoint_filter_fn",
    "resize_grid",
    "resize_matrix",
    "warm_start",
]


def _cfg(**values: Any) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "fixed_input_size": True,
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "patch_embed.proj",
        "classifier": ("head", "head_lookup"),
        "license": "apache-2.0",
        **values,
    }


default_cfgs = generate_default_cfgs(
    {
        "lookupvit_tiny_patch16_224": _cfg(),
        "lookupvit_small_patch16_224": _cfg(),
        "lookupvit_base_patch16_224": _cfg(),
        "lookupvit_large_patch16_224": _cfg(),
        "lookupvit_digits": _cfg(
            num_classes=10,
            input_size=(1, 16, 16),
            crop_pct=1.0,
            interpolation="bilinear",
            mean=(MEAN,),
            std=(STD,),
        ),
    }
)


def _create(name: str, pretrained: bool, **kwargs: Any) -> LookupViT:
    out_indices = kwargs.pop("out_indices", 3)
    return build_model_with_cfg(
        LookupViT,
        name,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": out_indices, "feature_cls": "getter"},
        **kwargs,
    )


@register_model
def lookupvit_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> LookupViT:
    """LookupViT-Ti/16: width 192, 12 blocks, 3 heads, 9.0 M parameters."""
    args = {"embed_dim": 192, "depth": 12, "num_heads": 3, **kwargs}
    return _create("lookupvit_tiny_patch16_224", pretrained, **args)


@register_model
def lookupvit_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> LookupViT:
    """LookupViT-S/16: width 384, 12 blocks, 6 heads, 34.9 M parameters."""
    args = {"embed_dim": 384, "depth": 12, "num_heads": 6, **kwargs}
    return _create("lookupvit_small_patch16_224", pretrained, **args)


@register_model
def lookupvit_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> LookupViT:
    """LookupViT-B/16: width 768, 12 blocks, 12 heads, 137.0 M parameters."""
    args = {"embed_dim": 768, "depth": 12, "num_heads": 12, **kwargs}
    return _create("lookupvit_base_patch16_224", pretrained, **args)


@register_model
def lookupvit_large_patch16_224(pretrained: bool = False, **kwargs: Any) -> LookupViT:
    """LookupViT-L/16: width 1024, 24 blocks, 16 heads."""
    args = {"embed_dim": 1024, "depth": 24, "num_heads": 16, **kwargs}
    return _create("lookupvit_large_patch16_224", pretrained, **args)


@register_model
def lookupvit_digits(pretrained: bool = False, **kwargs: Any) -> LookupViT:
    """The size of `vit_digits` for 16x16 grey images: width 96, 6 blocks, 8x8 lookup tokens."""
    args = {
        "img_size": 16,
        "patch_size": 2,
        "in_chans": 1,
        "num_classes": 10,
        "embed_dim": 96,
        "depth": 6,
        "num_heads": 4,
        "mlp_ratio": 3.0,
        "compressed_grid": None,
        **kwargs,
    }
    model = _create("lookupvit_digits", pretrained, **args)
    if not pretrained and isinstance(model, LookupViT):
        _init_positions(model)
    return model


@torch.no_grad()
def _init_positions(model: LookupViT) -> None:
    """Start the learned positions from sines and cosines, as `vit_digits` does and says why."""
    rows, columns = model.patch_embed.grid_size
    if model.embed_dim % 4 or model.pos_embed.is_meta:
        return
    table = build_sincos2d_pos_embed([rows, columns], model.embed_dim)
    model.pos_embed.copy_(table.T.unflatten(1, (rows, columns))[None])
