"""Scaled dot-product attention that also answers what reducers ask of it.

Shapes: B batch, H heads, N tokens (prefix included), d head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from reduction.functional.masking import policy_softmax
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
) -> tuple[Tensor, Signals]:
    """Attention output and the signals in `need`.

    The fused kernel is used unless the whole map is wanted or training masks are in play.

    Args:
        q: Queries `(B, H, N, d)`, rotated where the model has rotary embedding.
        k: Keys `(B, H, N, d)`, likewise.
        v: Values `(B, H, N, d)`.
        scale: Factor on the logits.
        bias: Added to the logits, broadcastable to `(B, H, N, N)`.
        dropout: Dropout rate of the attention weights.
        fused: Whether the model allows `scaled_dot_product_attention`.
        need: Any of "cls_row", "column", "attn".
        policy: Keep mask `(B, N)` for the masked softmax.

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
        out = F.dropout(map_, dropout) @ v
        return out, Signals(
            cls_row=map_[:, :, 0] if "cls_row" in need else None,
            column=map_.mean((1, 2)) if "column" in need else None,
            attn=map_ if "attn" in need else None,
        )
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout, scale=scale)
    return out, Signals(
        cls_row=class_row(q, k, scale, bias) if "cls_row" in need else None,
        column=column_mean(q, k, scale, bias) if "column" in need else None,
    )


def eager_on_cpu(x: Tensor) -> bool:
    """Whether this runs op by op on a CPU, not compiled, exported or traced."""
    tracing = torch.jit.is_tracing()  # type: ignore[no-untyped-call]
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and not tracing


def class_row(q: Tensor, k: Tensor, scale: float, bias: Tensor | None = None) -> Tensor:
    """Attention row of token 0 without the map.

    Returns:
        `(B, H, N)`, after the softmax.
    """
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


def column_mean(q: Tensor, k: Tensor, scale: float, bias: Tensor | None = None) -> Tensor:
    """Attention that each token receives, mean over heads and queries, `(B, N)`.

    Eager code goes image by image, so the map of the whole batch never exists.
    """
    if not eager_on_cpu(q) or torch.is_grad_enabled():
        return _column_mean(q, k, scale, bias)
    rows = [
        _column_mean(
            q[i : i + 1],
            k[i : i + 1],
            scale,
            bias if bias is None or bias.shape[0] == 1 else bias[i : i + 1],
        )
        for i in range(q.shape[0])
    ]
    return torch.cat(rows)


def _column_mean(q: Tensor, k: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    logits = (q * scale) @ k.transpose(-2, -1)
    if bias is not None:
        logits = logits + bias
    return logits.softmax(-1).mean((1, 2))


def attention_bias(
    size: Tensor | None, mask: Tensor | None, dtype: torch.dtype = torch.float32
) -> Tensor | None:
    """Additive bias on the keys, `(B, 1, 1, N)`.

    Args:
        size: Token sizes `(B, N)` for proportional attention, or None.
        mask: False marks padding, `(B, N)`, or None.
        dtype: Type of the features; the logarithm is taken in float32 or better.
    """
    bias = None if size is None else size.to(torch.promote_types(dtype, size.dtype)).log()
    if mask is not None:
        # The smallest finite number, so that a row of padding stays finite.
        lowest = torch.finfo(torch.float16).min
        bias = torch.where(mask, 0.0 if bias is None else bias, lowest)
    return None if bias is None else bias[:, None, None, :]
