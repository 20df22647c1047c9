"""Queries and keys without values, values alone: for reducers that change tokens in between."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from zoo.adapters.attention import (
    attention_weights,
    fused_layer,
    parts_of,
    projection,
    separable,
    split_heads,
)
from zoo.adapters.fast_linear import linear


def queries_keys(attn: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Normalised queries and keys of `x` `(B, N, C)`, each `(B, H, N, d)`."""
    if not separable(attn):
        return projection(attn)(attn, x)[:2]
    if fused_layer(attn) is None:
        q, k = (
            split_heads(attn.q_proj(x), _heads(attn)),
            split_heads(attn.k_proj(x), _heads(attn, True)),
        )
    else:
        q, k = (_third(attn, x, part) for part in (0, 1))
    q_norm, k_norm = attn._modules.get("q_norm"), attn._modules.get("k_norm")
    return q if q_norm is None else q_norm(q), k if k_norm is None else k_norm(k)


def values(attn: Any, x: Tensor) -> Tensor:
    """Values of `x` `(B, N, C)`, `(B, H, N, d)`."""
    if not separable(attn):
        return projection(attn)(attn, x)[2]
    if fused_layer(attn) is None:
        return split_heads(attn.v_proj(x), _heads(attn, True))
    return _third(attn, x, 2)


def without_values(attn: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys, and values of width 0."""
    q, k = queries_keys(attn, x)
    return q, k, k[..., :0]


def without_keys(attn: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys of width 0, and values."""
    v = values(attn, x)
    return v[..., :0], v[..., :0], v


def part_weights(attn: Any) -> tuple[int, int]:
    """Multiply-accumulates per token of `queries_keys` and of `values`."""
    if not separable(attn):
        whole = attention_weights(attn)[1]
        return whole, whole
    if fused_layer(attn) is None:
        return attn.q_proj.weight.numel() + attn.k_proj.weight.numel(), attn.v_proj.weight.numel()
    value = attn.qkv.weight.numel() // 3
    return 2 * value, value


def _heads(attn: Any, of_keys: bool = False) -> int:
    heads = parts_of(attn).heads
    return int(attn.__dict__.get("num_kv_heads", heads)) if of_keys else heads


def _third(attn: Any, x: Tensor, part: int) -> Tensor:
    """Queries (0), keys (1) or values (2) of a fused projection."""
    width = attn.qkv.weight.shape[0] // 3
    rows = slice(part * width, (part + 1) * width)
    bias = None if attn.qkv.bias is None else attn.qkv.bias[rows]
    if getattr(attn, "q_bias", None) is not None:
        own = (attn.q_bias, attn.k_bias, attn.v_bias)[part]
        bias = own if bias is None else bias + own
    return split_heads(linear(x, attn.qkv.weight[rows], bias), attn.num_heads)
