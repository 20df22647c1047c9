"""The usual block in a straight line, for plain evaluation on a CPU.

With one image there is little arithmetic in a block, and after every product of matrices the
interpreter finds its caches cold: a question that is asked once per block costs as much as a small
operation. So everything that can be asked is asked once per forward pass (`straight_blocks`), and
what then runs is operations alone: the parameters of the block's own layers, in timm's order, with
temporaries written over where timm takes new ones. The bits are the same.

Whoever could tell the difference is served by the modules themselves: gradients, training, hooks,
autocast, compilers, exporters, tracers, counters of operations, transforms, other devices, and
every class but timm's plain ones.

Shapes: B batch, N tokens with prefix, C width, H heads, d head width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import GELU, Attention, GELUTanh, LayerNorm, LayerScale, Mlp
from timm.models import vision_transformer
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from reduction.eager import autocasting, undisturbed
from reduction.functional.attention import attention_bias, signals
from reduction.functional.kernels import choose, fused
from reduction.functional.received import attention_and_column, shares_map
from reduction.mixins.gating import MlpGates
from reduction.tokens import Signals, Tokens
from zoo.adapters.attention import idle
from zoo.adapters.fast_linear import FastLinear, linear
from zoo.adapters.hooks import everywhere
from zoo.model.lane import Stage

_NONE = Signals()
# timm 1.0.20 has a class of its own for these blocks.
_SCALES = frozenset({LayerScale, vision_transformer.LayerScale})

Layer = tuple[Tensor, Tensor | None]
Norm = tuple[Sequence[int], Tensor | None, Tensor | None, float]


class Straight(NamedTuple):
    """What a block computes with: its own parameters.

    Attributes:
        norm1: Shape, weight, bias and epsilon of the layer norm before the attention.
        qkv: Weight and bias of the fused projection.
        q_norm: Of queries, or None.
        k_norm: Of keys, or None.
        heads: H.
        head_dim: d.
        scale: Factor on the logits.
        proj: Weight and bias behind the attention.
        gamma1: Layer scale of the attention, or None.
        norm2: Before the MLP.
        fc1: Weight and bias.
        act: Activation, which may write over its input.
        fc2: Weight and bias.
        gamma2: Layer scale of the MLP, or None.
        product: `F.linear`, or the one that minds the option `linear`.
    """

    norm1: Norm
    qkv: Layer
    q_norm: Norm | None
    k_norm: Norm | None
    heads: int
    head_dim: int
    scale: float
    proj: Layer
    gamma1: Tensor | None
    norm2: Norm
    fc1: Layer
    act: Callable[[Tensor], Tensor]
    fc2: Layer
    gamma2: Tensor | None
    product: Callable[[Tensor, Tensor, Tensor | None], Tensor]

    def attention(
        self,
        x: Tensor,
        bias: Tensor | None,
        need: frozenset[str],
        class_tokens: int,
        own: bool,
        live: Tensor | None = None,
    ) -> tuple[Tensor, Signals]:
        """`x` plus the attention branch, `(B, N, C)`, and the signals in `need`.

        Args:
            x: `(B, N, C)`; stays as it is.
            bias: Added to the logits, `(B, 1, 1, N)`, or None.
            need: Any signals that need no map of the whole attention, so all but "attn".
            class_tokens: Leading tokens that together act as the class token.
            own: Whether the kernel may be another than timm's.
            live: Tokens that are no padding, `(B, N)`; None where all are.
        """
        batch, n, _ = x.shape
        y = torch.layer_norm(x, *self.norm1)
        qkv = self.product(y, *self.qkv).reshape(batch, n, 3, self.heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if self.q_norm is not None:
            q = torch.layer_norm(q, *self.q_norm)
        if self.k_norm is not None:
            k = torch.layer_norm(k, *self.k_norm)
        column = None
        if own and "column" in need and shares_map(q, k, v, bias):
            out, column = attention_and_column(q, k, v, self.scale, bias, live)
        else:
            kernel = choose(q, k, v, self.scale, bias) if own else fused
            out = kernel(q, k, v, self.scale, bias)
        seen = _NONE
        if need:
            left = need if column is None else need - {"column"}
            seen = signals(q, k, self.scale, bias, left, class_tokens, live)
            seen = seen._replace(
                column=seen.column if column is None else column,
                k=k if "k" in need else None,
                v=v if "v" in need else None,
                x_norm=y if "x_norm" in need else None,
            )
        out = self.product(out.transpose(1, 2).flatten(2), *self.proj)
        if self.gamma1 is not None:
            out.mul_(self.gamma1)
        return _sum(x, out), seen

    def mlp(self, x: Tensor) -> Tensor:
        """`x` plus the MLP branch, `(B, N, C)`."""
        return _sum(x, self.mlp_branch(x))

    def mlp_branch(self, x: Tensor) -> Tensor:
        """The MLP branch alone, `(B, N, C)`."""
        hidden = self.act(self.product(torch.layer_norm(x, *self.norm2), *self.fc1))
        out = self.product(hidden, *self.fc2)
        if self.gamma2 is not None:
            out.mul_(self.gamma2)
        return out


class Line(NamedTuple):
    """The lane of a block that is resolved to its parameters.

    Attributes:
        block: Its parameters.
    """

    block: Straight

    def attention(self, t: Tokens, stage: Stage) -> tuple[Tokens, Signals]:
        """See `zoo.model.lane.Lane`, as for the others."""
        frame = stage.frame
        reducer = frame.reducer
        sizes = t.size if reducer is not None and reducer.prop_attn and not t.unit else None
        bias = attention_bias(sizes, t.mask, t.x.dtype)
        own = stage.positions_changed or frame.own_kernels
        need = stage.plan.need
        x, seen = self.block.attention(t.x, bias, need, frame.class_tokens, own, t.mask)
        return t._replace(x=x), seen

    def mlp(self, x: Tensor) -> Tensor:
        """See `Lane`."""
        return self.block.mlp(x)

    def mlp_gated(self, x: Tensor, gates: MlpGates) -> Tensor:
        """Never asked for: who switches parts of a block takes part in its attention."""
        raise NotImplementedError

    def mlp_seen(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See `Lane`."""
        branch = self.block.mlp_branch(x)
        return x + branch, branch


def _sum(x: Tensor, out: Tensor) -> Tensor:
    """`x + out`, written into `out`; in the memory order of `x`, as means over tokens see it."""
    return out.add_(x) if x.is_contiguous() else x + out


def straight_blocks(blocks: Iterable[nn.Module], x: Tensor) -> list[Straight | None]:
    """Every block that may run in a straight line now; None for the others.

    Args:
        blocks: Of a backbone.
        x: What enters the first, `(B, N, C)`.
    """
    calm = (
        not torch.is_grad_enabled() and undisturbed(x) and not autocasting(x) and not everywhere()
    )
    return [_resolve(b, x.dtype) if calm else None for b in blocks]


def _resolve(block: Any, dtype: torch.dtype) -> Straight | None:
    # Dictionaries are read directly: asking a module for its parts takes several times as long.
    if type(block) is not Block:
        return None
    b = block._modules
    attn, mlp = b["attn"], b["mlp"]
    if type(attn) is not Attention or type(mlp) is not Mlp:
        return None
    a, m = attn._modules, mlp._modules
    watched = any(map(_watched, (block, *b.values(), *a.values(), *m.values())))
    if watched or a.get("gate") is not None or not attn.fused_attn:
        return None
    unused = (b["drop_path1"], b["drop_path2"], a["attn_drop"], a.get("norm"), a["proj_drop"])
    if not all(map(idle, (*unused, m["drop1"], m["norm"], m["drop2"]))):
        return None
    norms = (b["norm1"], b["norm2"], *(n for n in (a["q_norm"], a["k_norm"]) if not idle(n)))
    layers = (a["qkv"], a["proj"], m["fc1"], m["fc2"])
    scales = [s for s in (b["ls1"], b["ls2"]) if not idle(s)]
    if not (
        all(type(n) is nn.LayerNorm or (type(n) is LayerNorm and not n._fast_norm) for n in norms)
        and all(type(f) in (nn.Linear, FastLinear) for f in layers)
        and all(type(s) in _SCALES for s in scales)
        and all(_ordinary(part, dtype) for part in (*norms, *layers, *scales))
    ):
        return None
    return Straight(
        norm1=_norm(b["norm1"]),
        qkv=_layer(a["qkv"]),
        q_norm=None if idle(a["q_norm"]) else _norm(a["q_norm"]),
        k_norm=None if idle(a["k_norm"]) else _norm(a["k_norm"]),
        heads=attn.num_heads,
        head_dim=attn.head_dim,
        scale=attn.scale,
        proj=_layer(a["proj"]),
        gamma1=_gamma(b["ls1"]),
        norm2=_norm(b["norm2"]),
        fc1=_layer(m["fc1"]),
        act=_activation(m["act"]),
        fc2=_layer(m["fc2"]),
        gamma2=_gamma(b["ls2"]),
        product=linear if any(type(f) is FastLinear for f in layers) else F.linear,
    )


def _watched(m: nn.Module | None) -> bool:
    """Whether somebody waits for a module to be called, or has replaced what a call does."""
    if m is None:
        return False
    changed = "forward" in m.__dict__ or "_compiled_call_impl" in m.__dict__
    return changed or bool(m._forward_hooks or m._forward_pre_hooks)


def _ordinary(m: Any, dtype: torch.dtype) -> bool:
    """Whether all parameters are there and plain ones of this type; temporaries are so, too."""
    names = ("gamma",) if type(m) in _SCALES else ("weight", "bias")
    return all(name in m._parameters for name in names) and all(
        p is None or (p.dtype is dtype and type(p) in (Tensor, nn.Parameter))
        for p in m._parameters.values()
    )


def _activation(m: Any) -> Callable[[Tensor], Tensor]:
    """A module that writes over its input, where it is known how."""
    kind = type(m)
    if kind not in (nn.GELU, GELU, GELUTanh):
        return m
    approximate = "tanh" if kind is GELUTanh else getattr(m, "approximate", "none")
    in_place: Any = torch._C._nn
    return partial(in_place.gelu_, approximate=approximate)


def _norm(m: Any) -> Norm:
    p = m._parameters
    return m.normalized_shape, p["weight"], p["bias"], m.eps


def _layer(m: Any) -> Layer:
    return m._parameters["weight"], m._parameters["bias"]


def _gamma(m: Any) -> Tensor | None:
    return None if idle(m) else m._parameters["gamma"]
