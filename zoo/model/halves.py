"""Through a block's own modules: in two halves, or as a whole."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

from reduction.counts import Step
from reduction.eager import autocasting
from reduction.functional.attention import attention_bias
from reduction.functional.carriers import append, trim
from reduction.mixins.attention import AttentionInput, AttentionOutput, ExtraKeys, OwnAttention
from reduction.mixins.gating import Gates, MlpGates
from reduction.schedules.base import Schedule
from reduction.tokens import Signals, Tokens
from zoo.adapters.attention import (
    Shift,
    attend,
    parts_of,
    projection,
    ready,
    through,
    watched_attend,
)
from zoo.adapters.blocks import BlockAdapter
from zoo.adapters.split_qkv import without_keys, without_values
from zoo.adapters.tower import rope_for
from zoo.errors import UnsupportedModel, ZooError
from zoo.model.lane import Stage
from zoo.model.straight import Straight

_NONE = Signals()


class Whole(NamedTuple):
    """A block that runs itself; what `Lane.attention` returns has been through the MLP, too.

    Attributes:
        block: The block, or its `forward` where its hooks are called elsewhere.
        adapter: How to run its class.
    """

    block: Callable[..., Tensor]
    adapter: BlockAdapter

    def attention(self, t: Tokens, stage: Stage) -> tuple[Tokens, Signals]:
        """All of the block. Nothing is seen inside."""
        embedded = stage.frame.embedded
        extra: dict[str, Any] = dict(embedded.more)
        if self.adapter.rope:
            extra["rope"] = rope_for(embedded, stage.block, t, stage.positions_changed)
        bias = attention_bias(_sizes(t, stage), t.mask, t.x.dtype)
        if bias is not None:
            extra["attn_mask"] = bias if autocasting(t.x) else bias.to(t.x.dtype)
        return t._replace(x=self.adapter.call(self.block, t.x, extra)), _NONE

    def mlp(self, x: Tensor) -> Tensor:
        """Nothing is left to do."""
        return x

    def mlp_gated(self, x: Tensor, gates: MlpGates) -> Tensor:
        """Never asked for, see `mlp_seen`."""
        raise NotImplementedError

    def mlp_seen(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Never asked for: whoever wants it listens, and then the block runs in halves."""
        raise NotImplementedError


class Halves(NamedTuple):
    """A block in two halves, through its modules.

    Attributes:
        block: The block.
        adapter: How to run its class.
        straight: Its parameters, where the MLP may be computed from them.
        hooked: Whether somebody waits for its attention module to be called.
    """

    block: Any
    adapter: BlockAdapter
    straight: Straight | None
    hooked: bool

    def attention(self, t: Tokens, stage: Stage) -> tuple[Tokens, Signals]:
        """Attention with everything that may happen in it: keys of a reducer, rows, shifts."""
        frame, plan, block, adapter = stage.frame, stage.plan, self.block, self.adapter
        reducer, step = frame.reducer, plan.step
        inside = stage.inside is not None and stage.inside.inside(t)
        extra = None
        if inside and step is not None and isinstance(reducer, ExtraKeys):
            extra = reducer.extra_keys(t, step)
        all_ = t if extra is None else append(t, extra)
        own = None
        if inside and isinstance(reducer, OwnAttention):
            own = _bound(reducer, all_, step)
        changed = stage.positions_changed or extra is not None
        bias = _bias(all_, stage, changed, t.unit)
        shift = _shift(frame.plugins, stage.block, frame.schedule) if frame.plugins else None
        weights: list[Tensor] = []
        listen = partial(
            watched_attend if self.hooked else attend,
            prefix=t.prefix,
            rope=rope_for(frame.embedded, stage.block, all_, changed),
            bias=bias,
            policy=all_.policy,
            need=plan.need,
            class_tokens=frame.class_tokens,
            own=own,
            rows=plan.rows,
            shift=shift,
            tap=None if frame.watch is None else weights.append,
            free=stage.positions_changed or frame.own_kernels,
            live=all_.mask,
            **self._rereading(stage, shift),
        )
        branch, result = adapter.attn_branch(block, all_.x, listen)
        if frame.watch is not None:
            frame.watch(stage.block, *_seen(stage, t, result.tokens, weights))
        if extra is not None:
            length = t.x.shape[1]
            branch = branch[:, :length]
            result = result._replace(signals=trim(result.signals, length))
        if frame.note is not None and result.tokens is not None:
            frame.note(stage.block, t, result.tokens)
        t = t if result.tokens is None else result.tokens
        if plan.rows is not None:
            t = _first(t, plan.rows)
        if isinstance(reducer, Gates) and step is not None:
            branch = branch * reducer.attention_gate(t).to(branch.dtype)
        return t._replace(x=t.x + branch), result.signals

    def mlp(self, x: Tensor) -> Tensor:
        """See `Lane`."""
        if self.straight is not None:
            return self.straight.mlp(x)
        return self.adapter.mlp_half(self.block, x)

    def mlp_seen(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See `Lane`."""
        if self.adapter.mlp_branch is None:
            raise UnsupportedModel(
                f"block class {type(self.block).__name__} has no one MLP whose answer could be "
                "looked at; choose a method that does not read it"
            )
        branch = self.adapter.mlp_branch(self.block, x)
        drop = self.adapter.mlp_drop(self.block)
        return x + (branch if drop is None else through(drop, branch)), branch

    def mlp_gated(self, x: Tensor, gates: MlpGates) -> Tensor:
        """See `Lane`."""
        if self.adapter.mlp_masked is None:
            raise UnsupportedModel(
                f"block class {type(self.block).__name__} has no one MLP whose input could be "
                "masked; choose a method that does not switch parts of blocks"
            )
        branch = self.adapter.mlp_masked(self.block, x, gates.features.to(x.dtype))
        branch = branch * gates.branch.to(branch.dtype)
        drop = self.adapter.mlp_drop(self.block)
        return x + (branch if drop is None else through(drop, branch))

    def _rereading(self, stage: Stage, shift: Shift | None) -> dict[str, Any]:
        """Arguments of `attend` for a reducer that changes tokens between keys and values."""
        reducer, frame, block = stage.frame.reducer, stage.frame, self.block
        within = stage.plan.step is not None and reducer is not None and reducer.site == "attn"
        if not within or not isinstance(reducer, OwnAttention) or reducer.rereads == "no":
            return {}
        attn = self.adapter.attn(block)

        def again(t: Tokens, values_only: bool) -> AttentionInput:
            x = self.adapter.attn_input(block, t.x)
            if shift is not None:
                q, k, v = projection(attn)(attn, x, shift)
            else:
                q, k, v = (without_keys if values_only else projection(attn))(attn, x)
            rope = None if values_only else rope_for(frame.embedded, stage.block, t, True)
            q, k, v = ready(attn, q, k, v, t.prefix, rope)
            bias = _bias(t, stage, True)
            parts = parts_of(attn)
            dropout = parts.dropout if attn.training else 0.0
            return AttentionInput(q, k, v, parts.scale, bias, dropout, parts.fused, frozenset())

        return {"project": without_values, "again": again}


def _bias(t: Tokens, stage: Stage, changed: bool, unit: bool | None = None) -> Tensor | None:
    """All that is added to the logits: for sizes, for padding, and for where tokens are."""
    bias = attention_bias(_sizes(t, stage, unit), t.mask, t.x.dtype)
    own = None if stage.frame.bias is None else stage.frame.bias(stage.block, t, changed)
    if own is None or bias is None:
        return bias if own is None else own
    return own + bias


def _sizes(t: Tokens, stage: Stage, unit: bool | None = None) -> Tensor | None:
    """Sizes for proportional attention, where the reducer asks for it and some are not one."""
    reducer = stage.frame.reducer
    unit = t.unit if unit is None else unit
    return t.size if reducer is not None and reducer.prop_attn and not unit else None


def _seen(
    stage: Stage, before: Tokens, behind: Tokens | None, weights: Sequence[Tensor]
) -> tuple[Tokens, Tensor]:
    """Tokens that were the keys of an attention, and its weights.

    Raises:
        ZooError: If a method computed the attention and did not show the weights.
    """
    if not weights:
        raise ZooError(
            f"reducer {getattr(stage.frame.reducer, 'name', '')!r} computes the attention of block "
            f"{stage.block} itself and shows no weights; let it pass them through "
            "AttentionInput.dropped"
        )
    last = weights[-1]
    if behind is not None and last.shape[-1] == behind.x.shape[1] < before.x.shape[1]:
        return behind, last
    return before, last[:, :, : before.x.shape[1]]


def _bound(
    reducer: OwnAttention, t: Tokens, step: Step | None
) -> Callable[[AttentionInput], AttentionOutput | None]:
    return lambda given: reducer.attend(given, t, step)


def _shift(plugins: Iterable[Any], block: int, schedule: Schedule | None) -> Shift | None:
    """What all plugins together add to queries and values."""
    # Neither := in a comprehension nor a closure: they keep a graph from being captured whole.
    given = [p.shift(block, schedule) for p in plugins]
    shifts = [s for s in given if s is not None]
    if len(shifts) < 2:
        return shifts[0] if shifts else None
    return partial(_total, shifts)


def _total(shifts: Sequence[Shift], x: Tensor) -> tuple[Tensor, Tensor]:
    q, v = shifts[0](x)
    for further in shifts[1:]:
        more_q, more_v = further(x)
        q, v = q + more_q, v + more_v
    return q, v


def _first(t: Tokens, rows: int) -> Tokens:
    """Prefix tokens alone, for a head that reads nothing else."""
    mask = None if t.mask is None else t.mask[:, :rows]
    origin = None if t.origin is None else t.origin[:, :0]
    return t._replace(x=t.x[:, :rows], size=t.size[:, :rows], mask=mask, origin=origin)
