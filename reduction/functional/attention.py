"""Scaled dot-product attention that also answers what reducers ask of it.

Shapes: B batch, H heads, N tokens (prefix included), d head width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from reduction.eager import eager_on_cpu, exporting
from reduction.functional.kernels import dot_product_attention
from reduction.functional.masking import policy_softmax
from reduction.functional.received import attention_and_column, column_mean, mean_row, shares_map
from reduction.tokens import Signals


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    fused: bool = True,
    need: frozenset[str] = frozenset(),
    policy: Tensor | None = None,
    class_tokens: int = 1,
    drop: Callable[[Tensor], Tensor] | None = None,
    free: bool = False,
    live: Tensor | None = None,
) -> tuple[Tensor, Signals]:
    """Attention output and the signals in `need`.

    A fused kernel, or on a CPU what was measured to be at least as fast (`functional.kernels`), is
    used unless the whole map is wanted or training masks are in play.

    Args:
        q: Queries `(B, H, N, d)`, rotated where the model has rotary embedding.
        k: Keys `(B, H, N, d)`, likewise.
        v: Values `(B, H, N, d)`.
        scale: Factor on the logits.
        bias: Added to the logits, broadcastable to `(B, H, N, N)`.
        dropout: Dropout rate of the attention weights.
        fused: Whether the model allows other kernels than the plain products.
        need: Any of "cls_row", "column", "attn".
        policy: Keep mask `(B, N)` for the masked softmax.
        class_tokens: Leading tokens that together act as the class token; "cls_row" is the mean
            of their rows.
        drop: Dropout of attention weights, where somebody watches it; without `fused` only.
        free: Whether the output may differ from the kernel's in the last bits.
        live: Queries that are no padding, `(B, N)`, of which "column" is the mean; None is all.

    Returns:
        Output `(B, H, N, d)` and the signals.
    """
    if bias is not None:
        bias = bias.to(q.dtype)
    if not fused or policy is not None or "attn" in need:
        logits = (q * scale) @ k.transpose(-2, -1)
        if bias is not None:
            logits = logits + bias
        map_ = logits.softmax(-1) if policy is None else policy_softmax(logits, policy)
        out = (F.dropout(map_, dropout) if drop is None else drop(map_)) @ v
        return out, Signals(
            cls_row=class_row_of(map_, class_tokens) if "cls_row" in need else None,
            column=mean_row(map_, live) if "column" in need else None,
            attn=map_ if "attn" in need else None,
        )
    if free and "column" in need and not dropout and shares_map(q, k, v, bias):
        out, column = attention_and_column(q, k, v, scale, bias, live)
        rest = signals(q, k, scale, bias, need - {"column"}, class_tokens)
        return out, rest._replace(column=column)
    out = dot_product_attention(q, k, v, scale, bias, dropout)
    return out, signals(q, k, scale, bias, need, class_tokens, live)


def signals(
    q: Tensor,
    k: Tensor,
    scale: float,
    bias: Tensor | None,
    need: frozenset[str],
    class_tokens: int = 1,
    live: Tensor | None = None,
) -> Signals:
    """What `need` names of "cls_row" and "column", without the map; arguments as of `attention`."""
    return Signals(
        cls_row=class_row(q, k, scale, bias, class_tokens) if "cls_row" in need else None,
        column=column_mean(q, k, scale, bias, live) if "column" in need else None,
    )


def class_row_of(map_: Tensor, class_tokens: int) -> Tensor:
    """What the class token pays, `(B, H, N)`, from the whole map; the mean row of several slots."""
    return map_[:, :, 0] if class_tokens == 1 else map_[:, :, :class_tokens].mean(2)


def class_row(
    q: Tensor, k: Tensor, scale: float, bias: Tensor | None = None, class_tokens: int = 1
) -> Tensor:
    """Attention row of token 0, or the mean of the first few rows, without the map.

    Returns:
        `(B, H, N)`, after the softmax.
    """
    if class_tokens > 1:
        rows = (q[:, :, :class_tokens] @ k.transpose(-2, -1)) * scale
        rows = rows if bias is None else rows + bias[:, :, :class_tokens]
        return rows.softmax(-1).mean(2)
    if eager_on_cpu(q):
        # Products on the (B, N, H, d) view run along memory; the batched matrix-vector product
        # of the other branch is several times slower here.
        logits = (k.transpose(1, 2) * q[:, :, :1].transpose(1, 2)).sum(-1) * scale
        logits = logits.transpose(1, 2)
    else:
        logits = (q[:, :, :1] @ k.transpose(-2, -1)).squeeze(2) * scale
    if bias is not None:
        logits = logits + bias[:, :, 0]
    return logits.softmax(-1)


def attention_bias(
    size: Tensor | None, mask: Tensor | None, dtype: torch.dtype = torch.float32
) -> Tensor | None:
    """Additive bias on the keys, `(B, 1, 1, N)`.

    Args:
        size: Token sizes `(B, N)` for proportional attention, or None.
        mask: False marks padding, `(B, N)`, or None.
        dtype: Type of the features; the logarithm is taken in float32 or better.
    """
    bias = None
    if size is not None:
        if size.dtype != torch.float32 or dtype != torch.float32:
            size = size.to(torch.promote_types(dtype, size.dtype))
        # Sizes that a method lets fall to zero or below would be infinite or not a number.
        bias = size.clamp_min(torch.finfo(size.dtype).tiny).log()
    if mask is not None:
        # The smallest finite number, so that a row of padding stays finite.
        lowest = torch.finfo(torch.float16).min
        if bias is None:
            # torch misreads a mask of another type beside queries in double precision.
            bias = torch.zeros((), dtype=torch.promote_types(dtype, torch.float32)).to(mask.device)
        bias = torch.where(mask, bias, lowest)
    if bias is not None and exporting():
        # With a gradient through it, the layout recorded is not the one that exporters lower to.
        bias = bias.detach()
    return None if bias is None else bias[:, None, None, :]
