"""timm's differential attention: the difference of two softmax maps, of twice as many thin heads.

Both maps are attentions of the usual kind over the same values, so sizes, padding and removed
tokens act in each as they do anywhere. What a reducer is shown are the two maps as they are, as
`2 H` heads: their difference has rows with negative entries, which are no attention that a method
could rank by. timm 1.0.20 has no such attention.
"""

from __future__ import annotations

from typing import Any

import timm.layers
from torch import Tensor

from zoo.adapters.attention import Parts, Shift, register_attention, shifted, split_heads, through


def project(attn: Any, x: Tensor, shift: Shift | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of `DiffAttention`."""
    return pairs(attn, *shifted(attn.qkv(x), x, shift).chunk(3, dim=2))


def pairs(attn: Any, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`(B, N, C)` each, as 2 H heads that stand in pairs; both of a pair have the same values."""
    heads = 2 * attn.num_heads
    q, k = split_heads(q, heads), split_heads(k, heads)
    v = split_heads(v, attn.num_heads).repeat_interleave(2, dim=1)
    return through(attn.q_norm, q), through(attn.k_norm, k), v


def difference(attn: Any, out: Tensor) -> Tensor:
    """What the heads of all pairs put out, `(B, N, 4 H d)`, as one answer for each, `(B, N, C)`."""
    out = out.unflatten(2, (attn.num_heads, 2, 2 * attn.head_dim))
    factor = attn._compute_lambda().type_as(out)
    x = out[:, :, :, 0] - factor * out[:, :, :, 1]
    return (attn.sub_norm(x) * (1 - attn.lambda_init)).flatten(2)


def _parts(attn: Any) -> Parts:
    return Parts(
        2 * attn.num_heads,
        attn.head_dim,
        attn.proj.out_features,
        attn.scale,
        attn.attn_drop_p,
        attn.attn_drop,
        attn.fused_attn,
        lambda out: through(attn.norm, difference(attn, out)),
        lambda x: through(attn.proj_drop, attn.proj(x)),
        value_dim=2 * attn.head_dim,
    )


if (_Diff := getattr(timm.layers, "DiffAttention", None)) is not None:
    register_attention(_Diff, project, parts=_parts)
