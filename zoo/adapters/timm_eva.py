"""timm's Eva: EVA-02, DINOv3 and others with rotary positions."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import AttentionRope
from timm.models.eva import Eva, EvaAttention, EvaBlock, EvaBlockPostNorm
from torch import Tensor

from zoo.adapters.attention import Shift, register_attention, separate, shifted, through, unpack
from zoo.adapters.blocks import Attend, BlockAdapter, masked, register_block
from zoo.adapters.timm_tower import TimmTower
from zoo.adapters.timm_vit import attention, itself, post_attn, post_branch, post_mlp
from zoo.adapters.tower import Embedded, register_tower


class TimmEva(TimmTower):
    """timm's `Eva`."""

    title = "timm Eva"

    def embed(self, m: Any, images: Tensor) -> Embedded:
        """See `Tower`."""
        x, rope = m._pos_embed(m.patch_embed(images))
        return Embedded(x, rope, bool(getattr(m, "rope_mixed", False)))


def _attention_rope(
    attn: Any, x: Tensor, shift: Shift | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    return separate(attn, x, shift) if attn.qkv is None else attention(attn, x, shift)


def _eva_attention(
    attn: Any, x: Tensor, shift: Shift | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    if attn.qkv is None:
        return separate(attn, x, shift)
    if attn.q_bias is None:
        return attention(attn, x, shift)
    bias = torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
    if attn.qkv_bias_separate:
        qkv = attn.qkv(x) + bias
    else:
        qkv = F.linear(x, weight=attn.qkv.weight, bias=bias)
    q, k, v = unpack(shifted(qkv, x, shift), attn.num_heads)
    return attn.q_norm(q), attn.k_norm(k), v


def attn_half(b: Any, x: Tensor, attend: Attend) -> tuple[Tensor, Any]:
    """Attention half of a block with raw gains for layer scale, or none."""
    out, signals = attend(b.attn, b.norm1(x))
    if b.gamma_1 is not None:
        out = b.gamma_1 * out
    return through(b.drop_path1, out), signals


def mlp_half(b: Any, x: Tensor) -> Tensor:
    """The other half."""
    return x + through(b.drop_path2, mlp_branch(b, x))


def mlp_branch(b: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """What the other half adds."""
    out = b.mlp(masked(b.norm2(x), mask))
    return out if b.gamma_2 is None else b.gamma_2 * out  # type: ignore[no-any-return]


register_tower(Eva, TimmEva())
register_attention(AttentionRope, _attention_rope, separable=True)
register_attention(EvaAttention, _eva_attention, separable=True)
register_block(
    EvaBlock,
    BlockAdapter(attn_half, mlp_half, rope=True, mlp_branch=mlp_branch, mlp_masked=mlp_branch),
)
register_block(
    EvaBlockPostNorm,
    BlockAdapter(
        post_attn,
        post_mlp,
        rope=True,
        attn_input=itself,
        mlp_branch=post_branch,
        mlp_masked=post_branch,
    ),
)
