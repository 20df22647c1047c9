"""timm's distilled DeiT: two prefix tokens, each with a classifier of its own."""

from __future__ import annotations

from timm.models.deit import VisionTransformerDistilled

from zoo.adapters.timm_vit import TimmViT
from zoo.adapters.tower import register_tower


class TimmDistilled(TimmViT):
    """timm's `VisionTransformerDistilled`."""

    title = "timm VisionTransformerDistilled"


register_tower(VisionTransformerDistilled, TimmDistilled())
