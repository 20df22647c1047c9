"""timm's blocks with parts side by side: attention beside MLP, or attentions beside each other.

Either way the block itself stands for its attention, so that one set of heads is what a reducer
sees. Where the MLP reads the same tokens as the attention, nothing can happen between the two: a
reduction there happens behind both.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.models import vision_transformer
from timm.models.vision_transformer import ParallelScalingBlock, ParallelThingsBlock
from torch import Tensor, nn

from zoo.adapters.attention import (
    Parts,
    Shift,
    attention_weights,
    linear_weights,
    parts_of,
    projection,
    register_attention,
    split_heads,
    through,
)
from zoo.adapters.blocks import Attend, BlockAdapter, register_block
from zoo.adapters.fast_linear import linear
from zoo.adapters.timm_diff import difference, pairs

# ------------------------------------------------------------------ attention beside MLP


def _rows(b: Any, x: Tensor, rows: slice) -> Tensor:
    """Some outputs of the projection that attention and MLP share."""
    bias = b.in_proj.bias
    if (zeros := b._buffers.get("qkv_bias")) is not None:
        # timm 1.0.20 adds the bias of the MLP in this order, behind zeros for q, k and v.
        bias = torch.cat((zeros, b.mlp_bias))
    return linear(x, b.in_proj.weight[rows], None if bias is None else bias[rows])


def _qkv(b: Any, x: Tensor, shift: Shift | None) -> list[Tensor]:
    q, k, v = _rows(b, x, slice(b.in_split[0], None)).chunk(3, dim=-1)
    if shift is not None:
        more_q, more_v = shift(x)
        q, v = q + more_q.to(q.dtype), v + more_v.to(v.dtype)
    return [q, k, v]


def _project(b: Any, x: Tensor, shift: Shift | None = None) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (split_heads(part, b.num_heads) for part in _qkv(b, x, shift))
    return through(b.q_norm, q), through(b.k_norm, k), v


def _project_pairs(b: Any, x: Tensor, shift: Shift | None = None) -> tuple[Tensor, Tensor, Tensor]:
    return pairs(b, *_qkv(b, x, shift))


def _parts(b: Any) -> Parts:
    width = b.in_proj.in_features
    drop = b.attn_drop
    return Parts(
        b.num_heads, b.head_dim, width, b.scale, drop.p, drop, b.fused_attn, None, lambda x: x
    )


def _parts_of_pairs(b: Any) -> Parts:
    heads, width = 2 * b.num_heads, b.in_proj.in_features
    more = b.scale, b.attn_drop_p, b.attn_drop, b.fused_attn, partial(difference, b)
    return Parts(heads, b.head_dim, width, *more, lambda x: x, value_dim=2 * b.head_dim)


def _beside(b: Any, x: Tensor, attend: Attend) -> tuple[Tensor, Any]:
    """Attention and MLP together: what the block adds."""
    y = b.in_norm(x)
    heads, seen = attend(b, y)
    hidden = _rows(b, y, slice(b.in_split[0]))
    if b.mlp_bias is not None and b._buffers.get("qkv_bias") is None:
        hidden = hidden + b.mlp_bias
    hidden = through(b.mlp_drop, b.mlp_act(hidden))
    whole = b._modules.get("out_proj")
    if whole is not None:
        out = whole(torch.cat((heads, hidden), dim=-1))
    else:
        out = b.attn_out_proj(heads) + b.mlp_out_proj(hidden)
    return through(b.drop_path, through(b.ls, out)), seen


def _weights(b: Any) -> tuple[int, int]:
    before = linear_weights(b.in_proj)
    return linear_weights(b) - before, before


_BESIDE = BlockAdapter(
    _beside,
    lambda b, x: x,
    rope=False,
    linear_macs=lambda b, tokens, prefix: 0,  # counted with the attention
    attn_input=lambda b, x: b.in_norm(x),
    attn=lambda b: b,
    inside=False,
    unheard=lambda b: (b.in_proj,),
)


# ------------------------------------------------------------------ attentions beside each other


def _project_all(b: Any, x: Tensor, shift: Shift | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Of all attentions together, as further heads; each has a norm of its own."""
    found = []
    for i, a in enumerate(b.attns):
        own = None if shift is None else partial(_share, shift, i, len(b.attns))
        found.append(projection(a.attn)(a.attn, a.norm(x), own))
    q, k, v = (torch.cat(heads, dim=1) for heads in zip(*found, strict=True))
    return q, k, v


def _share(shift: Shift, i: int, count: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """What a shift of all heads is for those of one attention."""
    q, v = shift(x)
    return q.chunk(count, dim=-1)[i], v.chunk(count, dim=-1)[i]


def _out_of_all(b: Any, x: Tensor) -> Tensor:
    """What all attentions add, from what their heads put out, `(B, N, H d)` side by side."""
    out = []
    for a, heads in zip(b.attns, x.chunk(len(b.attns), dim=-1), strict=True):
        parts = parts_of(a.attn)
        y = parts.proj(heads if parts.norm is None else parts.norm(heads))
        out.append(through(a.drop_path, through(a.ls, y)))
    return torch.stack(out).sum(dim=0)


def _all_parts(b: Any) -> Parts:
    one = parts_of(b.attns[0].attn)
    heads = len(b.attns) * one.heads
    return one._replace(heads=heads, norm=None, proj=lambda x: _out_of_all(b, x))


def _all_weights(b: Any) -> tuple[int, int]:
    weights = [attention_weights(a.attn) for a in b.attns]
    return sum(out for out, _ in weights), sum(inside for _, inside in weights)


def _attns(b: Any, x: Tensor, attend: Attend) -> tuple[Tensor, Any]:
    return attend(b, x)


def _ffns(b: Any, x: Tensor) -> Tensor:
    return x + _branch(b, x)


def _branch(b: Any, x: Tensor) -> Tensor:
    return torch.stack([ffn(x) for ffn in b.ffns]).sum(dim=0)


def _all(b: Any) -> Any:
    for a in b.attns:
        projection(a.attn)  # refuses what it does not know
    return b


def _inner(b: Any) -> Sequence[nn.Module]:
    return [part for a in b.attns for part in (a, a.attn)]


def _register(kind: Any, project: Any, parts: Any) -> None:
    register_attention(kind, project, parts=parts, weights=_weights)
    register_block(kind, _BESIDE)


_register(ParallelScalingBlock, _project, _parts)
# timm 1.0.20 has no differential attention.
if (_Diff := getattr(vision_transformer, "DiffParallelScalingBlock", None)) is not None:
    _register(_Diff, _project_pairs, _parts_of_pairs)
register_attention(ParallelThingsBlock, _project_all, parts=_all_parts, weights=_all_weights)
register_block(
    ParallelThingsBlock,
    BlockAdapter(
        _attns,
        _ffns,
        rope=False,
        attn_input=lambda b, x: x,
        mlp_branch=_branch,
        attn=_all,
        mlp=lambda b: b.ffns,
        mlp_drop=lambda b: None,
        unheard=_inner,
    ),
)
