"""timm's VisionTransformer: DeiT, DINOv2, CLIP, SigLIP, MAE, with registers or without."""

from __future__ import annotations

from typing import Any

from timm.layers import Attention
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer
from torch import Tensor

from zoo.adapters.attention import Shift, register_attention, shifted, through, unpack
from zoo.adapters.blocks import Attend, BlockAdapter, masked, register_block
from zoo.adapters.timm_tower import TimmTower
from zoo.adapters.tower import Embedded, register_tower


class TimmViT(TimmTower):
    """timm's `VisionTransformer`."""

    title = "timm VisionTransformer"

    def embed(self, m: Any, images: Tensor) -> Embedded:
        """See `Tower`."""
        x = m._pos_embed(m.patch_embed(images))
        return Embedded(m.patch_drop(x), None, False)


def attention(attn: Any, x: Tensor, shift: Shift | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of timm's `Attention`."""
    q, k, v = unpack(shifted(attn.qkv(x), x, shift), attn.num_heads)
    return through(attn.q_norm, q), through(attn.k_norm, k), v


def attn_half(b: Any, x: Tensor, attend: Attend) -> tuple[Tensor, Any]:
    """Attention half of the usual block."""
    out, signals = attend(b.attn, b.norm1(x))
    return through(b.drop_path1, through(b.ls1, out)), signals


def mlp_half(b: Any, x: Tensor) -> Tensor:
    """The other half."""
    return x + through(b.drop_path2, mlp_branch(b, x))


def mlp_branch(b: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """What the other half adds."""
    return through(b.ls2, b.mlp(masked(b.norm2(x), mask)))


def post_attn(b: Any, x: Tensor, attend: Attend) -> tuple[Tensor, Any]:
    """Attention half of a block that normalises behind its layers."""
    out, signals = attend(b.attn, x)
    return through(b.drop_path1, b.norm1(out)), signals


def post_mlp(b: Any, x: Tensor) -> Tensor:
    """The other half."""
    return x + through(b.drop_path2, post_branch(b, x))


def post_branch(b: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """What the other half adds."""
    return b.norm2(b.mlp(masked(x, mask)))  # type: ignore[no-any-return]


def itself(b: Any, x: Tensor) -> Tensor:
    """What an attention without a norm in front of it gets."""
    return x


register_tower(VisionTransformer, TimmViT())
register_attention(Attention, attention, separable=True)
register_block(
    Block,
    BlockAdapter(attn_half, mlp_half, rope=False, mlp_branch=mlp_branch, mlp_masked=mlp_branch),
)
register_block(
    ResPostBlock,
    BlockAdapter(
        post_attn,
        post_mlp,
        rope=False,
        attn_input=itself,
        mlp_branch=post_branch,
        mlp_masked=post_branch,
    ),
)
