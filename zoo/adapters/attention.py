"""What attention modules compute, in pieces that a reducer can listen to.

Each adapter restates a few lines of one class and is chosen by that class's exact `forward`, so
a subclass that computes something else is refused instead of being run wrongly. The parity tests
hold every line to a difference of zero.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import DropPath, apply_rot_embed_cat
from torch import Tensor, nn

from reduction.eager import traced
from reduction.mixins.attention import AttentionInput, AttentionOutput
from reduction.tokens import Signals, Tokens
from zoo.adapters.families import load_families
from zoo.adapters.fast_linear import FastLinear, linear
from zoo.adapters.hooks import awaited, called, hooked
from zoo.errors import UnsupportedModel, ZooError

#: What to add to queries and values, `(B, N, H d)` each, given the normalised input `(B, N, C)`.
Shift = Callable[[Tensor], tuple[Tensor, Tensor]]
Projection = Callable[..., tuple[Tensor, Tensor, Tensor]]
#: Gets attention weights `(B, H, queries, keys)`, after the softmax and before dropout.
Tap = Callable[[Tensor], None]
_PROJECTIONS: dict[object, Projection] = {}
_SEPARABLE: set[object] = set()


class Parts(NamedTuple):
    """What stands around the two products of an attention, whatever its library calls it.

    Attributes:
        heads: Number of heads H.
        head_dim: Width of a head d.
        width: Features that come out.
        scale: Factor on the logits.
        dropout: Dropout rate of the attention weights in training.
        drop: The module that drops them where no fused kernel does; None where there is none.
        fused: Whether the model allows a fused kernel.
        norm: What the heads go through, `(B, N, H d)`, before the output projection.
        proj: The output projection, with whatever stands behind it.
        rotate_half: Whether rotary embedding turns the halves of a head and not its pairs.
        value_dim: Width of the values of a head, where it is another than d; 0 is d.
    """

    heads: int
    head_dim: int
    width: int
    scale: float
    dropout: float
    drop: nn.Module | None
    fused: bool
    norm: Callable[[Tensor], Tensor] | None
    proj: Callable[[Tensor], Tensor]
    rotate_half: bool = False
    value_dim: int = 0


class Calling(NamedTuple):
    """How a library calls an attention module, for those who watch it by hooks.

    Attributes:
        given: `x -> args`: what its `forward` is given.
        answer: `out -> answer`: what it returns.
    """

    given: Callable[[Tensor], tuple[Any, ...]]
    answer: Callable[[Tensor], Any]


_PARTS: dict[object, Callable[[Any], Parts]] = {}
_WEIGHTS: dict[object, Callable[[Any], tuple[int, int]]] = {}
_CALLING: dict[object, Calling] = {}


def register_attention(
    cls: type[nn.Module],
    project: Projection,
    separable: bool = False,
    parts: Callable[[Any], Parts] | None = None,
    weights: Callable[[Any], tuple[int, int]] | None = None,
    calling: Calling | None = None,
) -> None:
    """Support an attention class.

    Args:
        cls: The class; subclasses that override `forward` are not covered.
        project: `project(attn, x, shift=None)` returns normalised q, k and v; a `Shift` is added
            before the normalisation of queries.
        separable: Whether q, k and v are the rows of one linear layer `qkv` or of `q_proj`,
            `k_proj` and `v_proj`, so that some of them may be computed without the others.
        parts: What stands around the products; None where the parts have timm's names.
        weights: See `attention_weights`; None where all are in linear layers of timm's names.
        calling: How its library calls it; None for `out = attn(x)`.
    """
    _PROJECTIONS[cls.forward] = project
    if parts is not None:
        _PARTS[cls.forward] = parts
    if weights is not None:
        _WEIGHTS[cls.forward] = weights
    if calling is not None:
        _CALLING[cls.forward] = calling
    if separable:
        _SEPARABLE.add(cls.forward)


def projection(attn: Any) -> Projection:
    """Adapter of an attention module.

    Raises:
        UnsupportedModel: If its class is not supported.
    """
    project = _PROJECTIONS.get(type(attn).forward)
    if project is None:
        load_families(type(attn))
        project = _PROJECTIONS.get(type(attn).forward)
    if project is None:
        raise UnsupportedModel(
            f"attention class {type(attn).__name__} is not supported; supported are Attention, "
            "AttentionRope and EvaAttention of timm, MultiheadAttention of torch, and Attention of "
            "open_clip"
        )
    return project


def parts_of(attn: Any) -> Parts:
    """What stands around the products of a supported attention module."""
    parts = _PARTS.get(type(attn).forward)
    return _timm_parts(attn) if parts is None else parts(attn)


def _timm_parts(attn: Any) -> Parts:
    # Dictionaries are read directly: asking a module for its parts takes several times as long.
    m, drop = attn._modules, attn._modules["attn_drop"]
    proj, norm, after = m["proj"], m.get("norm"), m["proj_drop"]
    return Parts(
        attn.num_heads,
        attn.__dict__.get("head_dim") or proj.in_features // attn.num_heads,
        proj.out_features,
        attn.scale,
        drop.p,
        drop,
        attn.fused_attn,
        None if norm is None else partial(through, norm),
        lambda x: through(after, proj(x)),
        attn.__dict__.get("rotate_half", False),
    )


def attention_weights(attn: Any) -> tuple[int, int]:
    """Multiply-accumulates per token: of the output projection, and of all that is before it."""
    weights = _WEIGHTS.get(type(attn).forward)
    if weights is not None:
        return weights(attn)
    out = linear_weights(attn.proj)
    return out, linear_weights(attn) - out


def linear_weights(module: nn.Module) -> int:
    """Multiply-accumulates of a module's linear layers for one token."""
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))


def idle(m: nn.Module | None) -> bool:
    """Whether a module does nothing now; an absent one does not."""
    kind = type(m)
    return m is None or kind is nn.Identity or (kind in (nn.Dropout, DropPath) and not m.training)


def through(module: nn.Module, x: Tensor) -> Tensor:
    """`module(x)`, without the call where the module does nothing and nobody watches it."""
    if idle(module) and not hooked(module):
        return x
    return module(x)  # type: ignore[no-any-return]


def split_heads(x: Tensor, heads: int) -> Tensor:
    """`(B, N, H d)` to `(B, H, N, d)`."""
    batch, n, width = x.shape  # not -1 for the last one, which nobody could tell of an empty batch
    return x.reshape(batch, n, heads, width // heads).transpose(1, 2)


def unpack(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """A fused projection `(B, N, 3 H d)` as queries, keys and values, `(B, H, N, d)` each."""
    batch, n, width = qkv.shape
    qkv = qkv.reshape(batch, n, 3, heads, width // (3 * heads))
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def shifted(qkv: Tensor, x: Tensor, shift: Shift | None) -> Tensor:
    """A fused projection of `x` with a shift added to queries and values."""
    if shift is None:
        return qkv
    q, v = shift(x)
    return qkv + torch.cat((q, torch.zeros_like(q), v), dim=-1).to(qkv.dtype)


def separate(attn: Any, x: Tensor, shift: Shift | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of three linear layers `q_proj`, `k_proj` and `v_proj`."""
    kv_heads = getattr(attn, "num_kv_heads", attn.num_heads)
    q, k, v = attn.q_proj(x), attn.k_proj(x), attn.v_proj(x)
    if shift is not None:
        more_q, more_v = shift(x)
        q, v = q + more_q.to(q.dtype), v + more_v.to(v.dtype)
    q, k, v = split_heads(q, attn.num_heads), split_heads(k, kv_heads), split_heads(v, kv_heads)
    return attn.q_norm(q), attn.k_norm(k), v


def project_rows(attn: Any, x: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """q of the first rows alone, and k and v of all; normalised.

    Args:
        attn: A supported attention module.
        x: `(B, N, C)`.
        rows: Queries wanted.
    """
    layer: Any = getattr(attn, "qkv", None)
    if not splits_queries(attn):
        q, k, v = projection(attn)(attn, x)
        return q[:, :, :rows], k, v
    width = layer.out_features // 3
    w, b = layer.weight, layer.bias
    q = linear(x[:, :rows], w[:width], None if b is None else b[:width])
    kv = linear(x, w[width:], None if b is None else b[width:])
    k, v = kv.unflatten(2, (2, attn.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return attn.q_norm(split_heads(q, attn.num_heads)), attn.k_norm(k), v


def splits_queries(attn: Any) -> bool:
    """Whether `project_rows` computes the fused projection in two parts: nobody listens to it."""
    layer = getattr(attn, "qkv", None)
    if layer is None or not separable(attn) or getattr(attn, "q_bias", None) is not None:
        return False
    return True


def fused_layer(attn: Any) -> Any:
    """The one layer that makes queries, keys and values; None where each has its own."""
    return attn._modules.get("qkv")


def separable(attn: Any) -> bool:
    """Whether the projection is one of timm's, of whose plain layers rows may be taken.

    Not where somebody waits for that layer to be called.
    """
    if type(attn).forward not in _SEPARABLE:
        return False
    layer = fused_layer(attn)
    # The hooks of a tracer only keep its books.
    watched = layer is not None and awaited(layer) and not traced()
    return layer is None or (type(layer) in (nn.Linear, FastLinear) and not watched)


def _rotate(x: Tensor, rope: Tensor, prefix: int, half: bool) -> Tensor:
    if x.shape[2] == prefix:
        return x
    rotated = apply_rot_embed_cat(x[:, :, prefix:], rope, **({"half": True} if half else {}))
    return torch.cat([x[:, :, :prefix], rotated], dim=2)


def ready(
    attn: Any, q: Tensor, k: Tensor, v: Tensor, prefix: int, rope: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotate queries and keys and give every head its own key, where the model does so."""
    if rope is not None:
        half = parts_of(attn).rotate_half
        q = _rotate(q, rope, prefix, half).type_as(v)
        k = _rotate(k, rope, prefix, half).type_as(v)
    groups = attn.__dict__.get("num_kv_groups", 1)
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    return q, k, v


def attend(
    attn: Any,
    x: Tensor,
    *,
    prefix: int,
    rope: Tensor | None = None,
    bias: Tensor | None = None,
    policy: Tensor | None = None,
    need: frozenset[str] = frozenset(),
    class_tokens: int = 1,
    own: Callable[[AttentionInput], AttentionOutput | None] | None = None,
    rows: int | None = None,
    project: Projection | None = None,
    again: Callable[[Tokens, bool], AttentionInput] | None = None,
    shift: Shift | None = None,
    tap: Tap | None = None,
    free: bool = False,
    live: Tensor | None = None,
) -> tuple[Tensor, AttentionOutput]:
    """Run an attention module and collect signals.

    Args:
        attn: A supported attention module.
        x: Its input `(B, N, C)`, already normalised.
        prefix: Leading tokens that are not rotated.
        rope: Rotary table of the other tokens, broadcastable to `(B, H, N - prefix, 2d)`.
        bias: Added to the attention logits, `(B, 1, 1, N)` or `(B, H, N, N)`.
        policy: Keep mask `(B, N)` for the masked softmax.
        need: Names of the signals to fill.
        class_tokens: Leading tokens that together act as the class token.
        own: Computes the attention instead; None as its answer means the usual one.
        rows: Compute the output of so many leading tokens only, which must not be more than
            `prefix`; None is all.
        project: Computes queries, keys and values instead of the module's adapter.
        again: Handed on to `own`, see `AttentionInput`.
        shift: What to add to queries and values; whatever else computes them then waits.
        tap: Gets the attention weights, for which the fused kernel is given up.
        free: See `AttentionInput`.
        live: Likewise.

    Returns:
        Output `(B, N, C)`, or `(B, rows, C)`, and the attention's own result with all signals.

    Raises:
        ZooError: If tokens are removed inside an attention whose output is gated.
    """
    # Looked up directly: asking a module for what it lacks is slow.
    gate = attn._modules.get("gate")
    gate = None if gate is None else gate(x).sigmoid()
    if shift is not None:
        q, k, v = projection(attn)(attn, x, shift)
        q = q if rows is None else q[:, :, :rows]
        gate = gate if gate is None or rows is None else gate[:, :rows]
    elif rows is None:
        q, k, v = (project or projection(attn))(attn, x)
    else:
        q, k, v = project_rows(attn, x, rows)
        gate = None if gate is None else gate[:, :rows]
    if rows is not None and bias is not None and bias.shape[2] > 1:
        bias = bias[:, :, :rows]
    signals = Signals(
        k=k if "k" in need else None,
        v=v if "v" in need else None,
        x_norm=x if "x_norm" in need else None,
    )
    q, k, v = ready(attn, q, k, v, prefix, rope)
    parts = parts_of(attn)
    dropout = parts.dropout if attn.training else 0.0
    fused = parts.fused and tap is None
    drop = None if fused else partial(_dropped, parts, dropout, tap)
    more = need, class_tokens, again, drop, x, free, live if rows is None else None
    given = AttentionInput(q, k, v, parts.scale, bias, dropout, fused, *more)
    result = None if own is None else own(given)
    if result is None:
        result = AttentionOutput(*run_attention(given, policy))
    signals = signals._replace(out=result.out if "out" in need else None)
    out = result.out.transpose(1, 2).flatten(2)
    out = out if parts.norm is None else parts.norm(out)
    if gate is not None:
        if gate.shape[1] != out.shape[1]:
            raise ZooError("tokens cannot be removed inside a gated attention")
        out = out * gate
    seen = result.signals
    signals = signals._replace(cls_row=seen.cls_row, column=seen.column, attn=seen.attn)
    return parts.proj(out), result._replace(signals=signals)


def watched_attend(attn: nn.Module, x: Tensor, **options: Any) -> tuple[Tensor, AttentionOutput]:
    """`attend`, and the hooks of the attention module fire."""
    seen: list[AttentionOutput] = []
    calling = _CALLING.get(type(attn).forward, _PLAIN)

    def work(x: Tensor, *_: Any) -> Any:
        out, result = attend(attn, x, **options)
        seen.append(result)
        return calling.answer(out)

    answer = called(attn, work, *calling.given(x))
    return (answer[0] if isinstance(answer, tuple) else answer), seen[0]


_PLAIN = Calling(lambda x: (x,), lambda out: out)


def _dropped(parts: Parts, dropout: float, tap: Tap | None, map_: Tensor) -> Tensor:
    """Attention weights after dropout, by the model's own module where that would be called."""
    if tap is not None:
        tap(map_)
    if parts.fused or parts.drop is None:
        return F.dropout(map_, dropout)
    return through(parts.drop, map_)


def run_attention(a: AttentionInput, policy: Tensor | None = None) -> tuple[Tensor, Signals]:
    """The usual attention for `a`."""
    return a.usual(policy)
