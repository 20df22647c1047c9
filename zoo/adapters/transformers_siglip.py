"""SigLIP's image tower of transformers: no class token; pooled by attention, or averaged."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.models.siglip import modeling_siglip as siglip

from reduction.functional.attention import attention_bias
from reduction.tokens import Tokens
from zoo.adapters.attention import linear_weights
from zoo.adapters.blocks import register_block
from zoo.adapters.heads import mean
from zoo.adapters.tower import register_tower
from zoo.adapters.transformers_attention import register_hf_attention
from zoo.adapters.transformers_clip import PLAIN
from zoo.adapters.transformers_tower import HfTower


class HfSiglip(HfTower):
    """`SiglipVisionModel`."""

    title = "transformers SigLIP"
    embedding = ("interpolate_pos_encoding",)
    layers, last_norm = "encoder.layers", "post_layernorm"
    loops = {"encoder": siglip.SiglipEncoder}

    def prefix(self, m: Any) -> int:
        """See `Tower`, as for all others."""
        return 0

    def class_tokens(self, m: Any) -> int:
        """See `Tower`."""
        return 0

    def reads(self, m: Any) -> str:
        """See `Tower`."""
        return "patches"

    def stem(self, m: Any) -> nn.Module:
        """See `Tower`."""
        return self.inner(m).embeddings.patch_embedding  # type: ignore[no-any-return]

    def pooled(self, m: Any, t: Tokens) -> Tensor | None:
        """See `HfTower`."""
        inner = self.inner(m)
        return attended(inner.head, t) if inner.use_head else None

    def feature(self, m: Any, t: Tokens) -> Tensor:
        """See `HfTower`."""
        pooled = None if self.part else self.pooled(m, t)
        return mean(t) if pooled is None else pooled

    def head_macs(self, m: Any, tokens: int) -> tuple[int, int]:
        """See `Tower`."""
        inner, width = self.inner(m), self.width(m)
        if self.part or not inner.use_head:
            return super().head_macs(m, tokens)
        linear = 2 * width * width * (1 + tokens) + linear_weights(inner.head.mlp)
        return linear, 2 * tokens * width


def attended(head: Any, t: Tokens) -> Tensor:
    """The pooling head on tokens: each counts for the patches in it."""
    bias = None if t.unit and t.mask is None else attention_bias(t.size, t.mask, t.x.dtype)
    if bias is None and t.policy is None:
        return head(t.x)  # type: ignore[no-any-return]
    if t.policy is not None:
        bias = attention_bias(t.size * t.policy, t.mask, t.x.dtype)
    assert bias is not None
    batch, n = t.x.shape[:2]
    mask = bias.to(t.x.dtype).expand(batch, head.attention.num_heads, 1, n).flatten(0, 1)
    probe = head.probe.repeat(batch, 1, 1)
    x = head.attention(probe, t.x, t.x, attn_mask=mask)[0]
    return (x + head.mlp(head.layernorm(x)))[:, 0]  # type: ignore[no-any-return]


register_hf_attention(siglip.SiglipAttention)
register_block(siglip.SiglipEncoderLayer, PLAIN)
_SIZE = "interpolate_pos_encoding"
register_tower(siglip.SiglipVisionModel, HfSiglip("", (_SIZE,)))
register_tower(
    siglip.SiglipForImageClassification,
    HfSiglip("vision_model", ("labels", _SIZE), passes_on=False),
)
