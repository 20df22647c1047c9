"""torch's `nn.MultiheadAttention`, which torchvision and open_clip build their towers of.

In evaluation without gradients torch computes it by one kernel of its own, whose answer differs
from its other one in the last bits. Where somebody listens, the pieces here are those of the other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from zoo.adapters.attention import Calling, Parts, Shift, register_attention, shifted, unpack
from zoo.errors import UnsupportedModel


def why_not_plain(attn: nn.MultiheadAttention) -> str:
    """What about an attention is not run here, in words; empty if it is the usual one."""
    if not attn.batch_first:
        return "its attention takes the sequence first (batch_first=False)"
    if attn.in_proj_weight is None:
        return "its attention has keys or values of another width than the queries (kdim, vdim)"
    if attn.bias_k is not None or attn.add_zero_attn:
        return "its attention adds keys of its own (add_bias_kv, add_zero_attn)"
    return ""


def _project(
    attn: nn.MultiheadAttention, x: Tensor, shift: Shift | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    if reason := why_not_plain(attn):
        raise UnsupportedModel(f"the model cannot be run block by block: {reason}")
    heads, weight, bias = attn.num_heads, attn.in_proj_weight, attn.in_proj_bias
    if shift is not None:
        q, k, v = unpack(shifted(F.linear(x, weight, bias), x, shift), heads)
        return q, k, v
    # Sequence first and one tensor each, as torch has them: the bits depend on it.
    batch, n, width = x.shape
    packed = F.linear(x.transpose(0, 1), weight, bias).unflatten(-1, (3, width))
    q, k, v = packed.unsqueeze(0).transpose(0, -2).squeeze(-2).contiguous().unbind(0)
    return _heads(q, heads), _heads(k, heads), _heads(v, heads)


def _heads(x: Tensor, heads: int) -> Tensor:
    """`(N, B, H d)` to `(B, H, N, d)`."""
    n, batch, width = x.shape
    return x.view(n, batch * heads, width // heads).transpose(0, 1).unflatten(0, (batch, heads))


def _out(attn: nn.MultiheadAttention) -> Callable[[Tensor], Tensor]:
    """The output projection, whose module torch never calls."""

    def project(x: Tensor) -> Tensor:
        batch, n, width = x.shape
        rows = x.transpose(0, 1).contiguous().view(n * batch, width)
        rows = F.linear(rows, attn.out_proj.weight, attn.out_proj.bias)
        return rows.view(n, batch, -1).transpose(0, 1)

    return project


def _parts(attn: Any) -> Parts:
    return Parts(
        heads=attn.num_heads,
        head_dim=attn.head_dim,
        width=attn.embed_dim,
        scale=attn.head_dim**-0.5,
        dropout=attn.dropout,
        drop=None,
        fused=True,
        norm=None,
        proj=_out(attn),
    )


def _weights(attn: Any) -> tuple[int, int]:
    return attn.out_proj.weight.numel(), attn.in_proj_weight.numel()


register_attention(
    nn.MultiheadAttention,
    _project,
    parts=_parts,
    weights=_weights,
    calling=Calling(lambda x: (x, x, x), lambda out: (out, None)),
)
