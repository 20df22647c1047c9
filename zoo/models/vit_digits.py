"""The tiny ViT for 16x16 grey images that ships with trained weights.

It exists so that everything (pretrained loading, off-the-shelf reduction, fine-tuning, reports) can
be tried and tested offline: 64 patches of 2x2 pixels, six blocks, 0.57 M parameters, trained on
scikit-learn's digits by `python train.py experiment=vit_digits`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from timm.layers import build_sincos2d_pos_embed
from timm.models import generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer, _create_vision_transformer

__all__ = ["MEAN", "STD"]

ASSET = Path(__file__).resolve().parent.parent / "assets" / "vit_digits"
# Of the 1,257 training images of `zoo.data.digits` at 16x16, scaled to [0, 1].
MEAN, STD = 0.306, 0.319


def grey(side: int, mean: float, std: float) -> dict[str, Any]:
    """What timm is told of a model for small grey images of ten classes.

    Args:
        side: Of the images, in pixels.
        mean: Of their pixels, scaled to [0, 1].
        std: Likewise.
    """
    return {
        "num_classes": 10,
        "input_size": (1, side, side),
        "fixed_input_size": True,
        "mean": (mean,),
        "std": (std,),
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "apache-2.0",
    }


default_cfgs = generate_default_cfgs(
    {
        "vit_digits": {"file": str(ASSET / "model.safetensors"), **grey(16, MEAN, STD)},
        "vit_digits_small": grey(16, MEAN, STD),
    }
)

_ARGS: dict[str, Any] = {
    "img_size": 16,
    "patch_size": 2,
    "in_chans": 1,
    "num_classes": 10,
    "embed_dim": 96,
    "depth": 6,
    "num_heads": 4,
    "mlp_ratio": 3,
}


@register_model
def vit_digits(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """Create the tiny digits ViT; any argument of timm's VisionTransformer can be overridden.

    Args:
        pretrained: Load the weights that ship with the package.
        **kwargs: Passed on to timm's VisionTransformer.

    Returns:
        A plain timm model that takes images of shape (B, 1, 16, 16).
    """
    model = _create_vision_transformer("vit_digits", pretrained=pretrained, **{**_ARGS, **kwargs})
    if not pretrained:
        init_pos_embed(model)
    return model


@register_model
def vit_digits_small(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """Create a digits ViT of about half the cost: what a reducer has to be better than.

    Width 64 instead of 96, everything else as in `vit_digits`. It has no shipped weights.

    Args:
        pretrained: Needs a file of yours in `pretrained_cfg_overlay`.
        **kwargs: Passed on to timm's VisionTransformer.

    Returns:
        A plain timm model that takes images of shape (B, 1, 16, 16).
    """
    args: dict[str, Any] = {**_ARGS, "embed_dim": 64}
    model = _create_vision_transformer(
        "vit_digits_small", pretrained=pretrained, **{**args, **kwargs}
    )
    if not pretrained:
        init_pos_embed(model)
    return model


def init_pos_embed(model: VisionTransformer) -> None:
    """Start the (learned) position embedding from sines and cosines.

    timm starts it near zero. With so few images the model then sees a bag of patches for a long
    time and stays at chance.
    """
    pos = model.pos_embed
    if pos is None or model.embed_dim % 4 or pos.is_meta:
        return
    table = build_sincos2d_pos_embed(list(model.patch_embed.grid_size), model.embed_dim)
    with torch.no_grad():
        pos[:, pos.shape[1] - table.shape[0] :] = table.to(pos)
