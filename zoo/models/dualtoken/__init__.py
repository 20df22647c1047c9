"""DualToken-ViT, unofficial: local tokens by convolution, 49 global tokens through all stages.

Chu et al., "DualToken-ViT: Position-aware Efficient Vision Transformer with Dual Token Fusion",
SDM 2024, arXiv 2309.12424. There is neither official code nor are there weights, and the widths are
in figures that were not at hand: docs/models/dualtoken.md says which details are the paper's.
"""

from __future__ import annotations

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from zoo.models.dualtoken.model import DualTokenViT
from zoo.models.vit_digits import MEAN, STD

__all__ = ["DualTokenViT"]


def _cfg(**values: Any) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "fixed_input_size": True,
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "stem.0",
        "classifier": "head",
        "license": "apache-2.0",
        "paper_name": "DualToken-ViT (unofficial)",
        **values,
    }


default_cfgs = generate_default_cfgs(
    {
        "dualtoken_tiny_unofficial": _cfg(),
        "dualtoken_digits_unofficial": _cfg(
            num_classes=10,
            input_size=(1, 16, 16),
            crop_pct=1.0,
            interpolation="bilinear",
            mean=(MEAN,),
            std=(STD,),
        ),
    }
)


@register_model
def dualtoken_tiny_unofficial(pretrained: bool = False, **kwargs: Any) -> DualTokenViT:
    """DualToken-ViT with LightViT-T's widths, which are our choice; there are no weights."""
    return build_model_with_cfg(  # type: ignore[no-any-return]
        DualTokenViT, "dualtoken_tiny_unofficial", pretrained, **kwargs
    )


@register_model
def dualtoken_digits_unofficial(pretrained: bool = False, **kwargs: Any) -> DualTokenViT:
    """The same for 16x16 grey images: two stages on 8x8 and 4x4 cells."""
    args: dict[str, Any] = {
        "img_size": 16,
        "in_chans": 1,
        "num_classes": 10,
        "dims": (48, 96),
        "depths": (2, 3),
        "num_heads": (2, 4),
        "mlp_ratios": (4.0, 3.0),
        "stem_steps": 1,
        **kwargs,
    }
    return build_model_with_cfg(  # type: ignore[no-any-return]
        DualTokenViT, "dualtoken_digits_unofficial", pretrained, **args
    )
