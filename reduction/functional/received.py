"""Attention that tokens receive, without a map of the whole batch.

Shapes: B batch, H heads, N queries, M keys, d head width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from reduction.eager import eager_on_cpu, recording, traced, undisturbed
from reduction.functional.kernels import mode

#: Bytes of a map that stay in a core's cache from one operation to the next.
_BLOCK = 2**20


def shares_map(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> bool:
    """Whether `attention_and_column` may stand for a fused kernel and `column_mean`."""
    return undisturbed(q) and not recording(q, k, v, bias) and mode() in ("auto", "explicit")


def attention_and_column(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    bias: Tensor | None = None,
    live: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention output `(B, H, N, d)` and `column_mean`, from one map.

    A fused kernel shows nobody its map: products and softmax would be computed once more. Records
    nothing.

    Args:
        q: `(B, H, N, d)`.
        k: `(B, H, M, d)`.
        v: `(B, H, M, d)`.
        scale: Factor on the logits.
        bias: Added to the logits, broadcastable to `(B, H, N, M)`.
        live: See `column_mean`.
    """
    if bias is not None:
        bias = bias.to(q.dtype)
    out, column = _in_blocks(q, k, v, scale, bias, live)
    # The layout that the next layer reads without a copy.
    return torch.cat(out).transpose(1, 2), column


def column_mean(
    q: Tensor,
    k: Tensor,
    scale: float,
    bias: Tensor | None = None,
    live: Tensor | None = None,
) -> Tensor:
    """Attention that each token receives, mean over heads and queries, `(B, M)`.

    With `live`, `(B, N)` bool, the mean is over the queries that are no padding.

    The map of the whole batch never exists at once, neither in the forward pass nor for the
    backward one: without gradient, eager code on a CPU goes by parts that stay in the cache, which
    is faster than all at once; otherwise a few queries of all images at a time, whose rows are
    computed again where a gradient passes.
    """
    records = recording(q, k)
    if eager_on_cpu(q) and not records:
        return _in_blocks(q, k, None, scale, bias, live)[1]
    n = q.shape[2]
    rows = min(64, -(-n // 4))
    total = q.new_zeros(())
    for start in range(0, n, rows):
        part = q[:, :, start : start + rows]
        own = _part(bias, slice(None), slice(start, start + rows))
        real = None if live is None else live[:, start : start + rows]
        if records and not traced():
            total = total + checkpoint(
                _column_sum,
                part,
                k,
                scale,
                own,
                real,
                use_reentrant=False,
                preserve_rng_state=False,
            )
        else:
            total = total + _column_sum(part, k, scale, own, real)
    return total / (q.shape[1] * _queries(q, live))


def mean_row(map_: Tensor, live: Tensor | None = None) -> Tensor:
    """`column_mean` where the whole map `(B, H, N, M)` is there."""
    if live is None:
        return map_.mean((1, 2))
    return (_sum(map_, live) / (map_.shape[1] * _queries(map_, live))).to(map_.dtype)


def _in_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    scale: float,
    bias: Tensor | None,
    live: Tensor | None,
) -> tuple[list[Tensor], Tensor]:
    """Outputs `(b, N, H, d)` of a few images each, none without `v`, and the column."""
    batch, heads, n, _ = q.shape
    row = heads * k.shape[2] * q.element_size()
    images = max(1, min(_BLOCK // (row * n or 1), batch // 4))
    rows = max(1, _BLOCK // row)
    out, columns = [], []
    for i in range(0, batch, images):
        some = slice(i, i + images)
        keys, values = k[some].transpose(-2, -1), None if v is None else v[some]
        outs, column = [], torch.zeros(())
        for start in range(0, n, rows):
            part = slice(start, start + rows)
            map_ = _map(q[some, :, part], keys, scale, _part(bias, some, part))
            if values is not None:
                outs.append((map_ @ values).transpose(1, 2))
            column = column + _sum(map_, None if live is None else live[some, part])
        columns.append(column.to(map_.dtype))
        if outs:
            out.append(outs[0] if len(outs) == 1 else torch.cat(outs, 1))
    return out, torch.cat(columns) / (heads * _queries(q, live))


def _part(bias: Tensor | None, images: slice, queries: slice) -> Tensor | None:
    if bias is None:
        return None
    bias = bias if bias.shape[0] == 1 else bias[images]
    return bias if bias.shape[2] == 1 else bias[:, :, queries]


def _map(q: Tensor, keys: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    logits = (q * scale) @ keys
    return (logits if bias is None else logits + bias).softmax(-1)


def _sum(map_: Tensor, live: Tensor | None) -> Tensor:
    if live is not None:
        map_ = map_ * live[:, None, :, None]
    return map_.sum((1, 2), dtype=torch.promote_types(map_.dtype, torch.float32))


def _column_sum(
    q: Tensor, k: Tensor, scale: float, bias: Tensor | None, live: Tensor | None = None
) -> Tensor:
    map_ = _map(q, k.transpose(-2, -1), scale, bias)
    return _sum(map_, live).to(map_.dtype)


def _queries(q: Tensor, live: Tensor | None) -> int | Tensor:
    return int(q.shape[2]) if live is None else live.sum(1, keepdim=True)
