"""A ViT for 28x28 grey images with the geometry of DeiT: 196 patches, a class token, 12 blocks.

Schedules that papers publish for DeiT at 224 px (EViT's stages, DiffRate's lists, ToMe's r) carry
over as they stand, at a thirteenth of DeiT-S' cost. `python train.py experiment=vit_fashion` trains
it on Fashion-MNIST.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from timm.models import generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer, _create_vision_transformer

from zoo.models.vit_digits import grey, init_pos_embed

__all__ = ["MEAN", "STD"]

# Of the 55,000 training images of `zoo.data.fashion_mnist`, scaled to [0, 1].
MEAN, STD = 0.286, 0.353

_ASSETS = Path(__file__).resolve().parent.parent / "assets"
default_cfgs = generate_default_cfgs(
    {
        name: {"file": str(_ASSETS / name / "model.safetensors"), **grey(28, MEAN, STD)}
        for name in ("vit_fashion", "vit_fashion_small")
    }
)

_ARGS: dict[str, Any] = {
    "img_size": 28,
    "patch_size": 2,
    "in_chans": 1,
    "num_classes": 10,
    "embed_dim": 96,
    "depth": 12,
    "num_heads": 3,
    "mlp_ratio": 4,
}


@register_model
def vit_fashion(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """Create the ViT for Fashion-MNIST; any argument of timm's VisionTransformer can be overridden.

    Args:
        pretrained: Load the weights that ship with the package.
        **kwargs: Passed on to timm's VisionTransformer.

    Returns:
        A plain timm model that takes images of shape (B, 1, 28, 28).
    """
    return _create("vit_fashion", pretrained, {**_ARGS, **kwargs})


@register_model
def vit_fashion_small(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """Create a model of half the cost: what a reducer has to be better than.

    Width 64 instead of 96 and two heads, everything else as in `vit_fashion`.

    Args:
        pretrained: Load the weights that ship with the package.
        **kwargs: Passed on to timm's VisionTransformer.

    Returns:
        A plain timm model that takes images of shape (B, 1, 28, 28).
    """
    args: dict[str, Any] = {**_ARGS, "embed_dim": 64, "num_heads": 2}
    return _create("vit_fashion_small", pretrained, {**args, **kwargs})


def _create(name: str, pretrained: bool, args: dict[str, Any]) -> VisionTransformer:
    model = _create_vision_transformer(name, pretrained=pretrained, **args)
    if not pretrained:
        init_pos_embed(model)
    return model
