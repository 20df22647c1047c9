"""DINOv3's vision transformer of transformers: registers, and positions by rotation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.dinov3_vit import modeling_dinov3_vit as dinov3

from reduction.tokens import Tokens
from zoo.adapters.blocks import BlockAdapter, register_block
from zoo.adapters.tower import Embedded, register_tower
from zoo.adapters.transformers_attention import plain_forward, register_hf_attention
from zoo.adapters.transformers_dinov2 import (
    attention_of,
    attn_half,
    drop_of,
    mlp_branch,
    mlp_half,
)
from zoo.adapters.transformers_tower import HfTower


class HfDinov3(HfTower):
    """`DINOv3ViTModel`."""

    title = "transformers DINOv3"
    embedding = ("bool_masked_pos",)
    any_size = True
    layers, last_norm = "model.layer", "norm"
    loops = {"model": dinov3.DINOv3ViTEncoder}

    def prefix(self, m: Any) -> int:
        """See `Tower`, as for all others."""
        return 1 + int(m.config.num_register_tokens)

    def embed(self, m: Any, images: Tensor, **options: Any) -> Embedded:
        """See `Tower`."""
        images = self.cast(m, images)
        x = super().embed(m, images, **options).x
        cos, sin = m.rope_embeddings(images)
        return Embedded(x, torch.cat([sin, cos], dim=-1), False)

    def stem(self, m: Any) -> nn.Module:
        """See `Tower`."""
        return m.embeddings.patch_embeddings  # type: ignore[no-any-return]

    def pooled(self, m: Any, t: Tokens) -> Tensor | None:
        """See `HfTower`."""
        return t.x[:, 0]


def _call(block: Any, x: Tensor, extra: dict[str, Any]) -> Tensor:
    sin, cos = extra["rope"].chunk(2, dim=-1)
    run = plain_forward(block)
    return run(x, extra.get("attn_mask"), position_embeddings=(cos, sin))  # type: ignore[no-any-return]


register_tower(dinov3.DINOv3ViTModel, HfDinov3("", ("bool_masked_pos",)))
register_hf_attention(dinov3.DINOv3ViTAttention)
register_block(
    dinov3.DINOv3ViTLayer,
    BlockAdapter(
        attn_half,
        mlp_half,
        rope=True,
        mlp_branch=mlp_branch,
        mlp_masked=mlp_branch,
        attn=attention_of,
        mlp_drop=drop_of,
        call=_call,
    ),
)
