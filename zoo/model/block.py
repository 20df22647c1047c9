"""One block with its reduction: through the block's modules, or in a straight line."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from reduction.base import Reducer
from reduction.counts import Step
from reduction.eager import autocasting, undisturbed
from reduction.functional.attention import attention_bias
from reduction.functional.carriers import append, reduce_sparing, trim
from reduction.mixins.attention import (
    AttentionInput,
    AttentionOutput,
    ExtraKeys,
    InAttention,
    OwnAttention,
)
from reduction.mixins.following import Follows
from reduction.mixins.parking import Parks
from reduction.schedules.base import Schedule
from reduction.tokens import Signals, Tokens
from zoo.adapters.attention import Shift, attend, projection, ready
from zoo.adapters.backbones import Embedded, class_tokens, rope_for
from zoo.adapters.blocks import block_adapter, hooked
from zoo.adapters.fast_linear import Mode, using
from zoo.adapters.split_qkv import without_keys, without_values
from zoo.model.plan import Plan
from zoo.model.straight import Straight, straight_blocks

if TYPE_CHECKING:
    from zoo.model.reduced import ReducedViT


class Pass(NamedTuple):
    """What the blocks of one forward pass share.

    Attributes:
        blocks: Of the backbone.
        reducer: Of the model, or None.
        plugins: Of the model.
        schedule: Of the model, or None.
        own_kernels: See `zoo.model.runtime.Runtime`.
        embedded: From `embed`.
        straight: Blocks as their parameters, None in place of those that have to be called.
        whole: Whether nothing but straight lines and `Reducer.reduce` is needed where there are
            such: no plugin, rotary table, or attention of the reducer's own.
        class_tokens: Leading tokens that act as the class token, at least 1.
    """

    blocks: Sequence[nn.Module]
    reducer: Reducer | None
    plugins: Sequence[Any]
    schedule: Schedule | None
    own_kernels: bool
    embedded: Embedded
    straight: Sequence[Straight | None]
    whole: bool
    class_tokens: int


def prepare(model: ReducedViT, t: Tokens, embedded: Embedded) -> Pass:
    """Answer once for a forward pass what all blocks would ask.

    Args:
        model: About to run.
        t: What enters its first block.
        embedded: From `embed`.
    """
    reducer, plugins, blocks = model.reducer, list(model.plugins), list(model.backbone.blocks)
    usual = not isinstance(reducer, InAttention)
    return Pass(
        blocks,
        reducer,
        plugins,
        model.schedule,
        model.runtime.own_kernels,
        embedded,
        straight_blocks(blocks, t.x),
        whole=usual and not plugins and embedded.rope is None,
        class_tokens=max(1, class_tokens(model.backbone)),
    )


def run_block(
    i: int, t: Tokens, signals: Signals, plan: Plan, moved: bool, shared: Pass
) -> tuple[Tokens, Signals]:
    """One block with its reduction: the unit of gradient checkpointing.

    Args:
        i: Which block.
        t: Tokens entering it.
        signals: Of the block before.
        plan: Of this block.
        moved: Whether tokens are no longer in their first places.
        shared: From `prepare`.

    Returns:
        Tokens leaving it, and its signals.
    """
    block = shared.straight[i]
    usual = shared.whole and plan.rows is None and not plan.spared and t.policy is None
    if block is None or not usual or "attn" in plan.need:
        return _through_modules(i, t, signals, plan, moved, shared)
    return _straight(i, block, t, signals, plan, moved, shared)


def _straight(
    i: int, block: Straight, t: Tokens, signals: Signals, plan: Plan, moved: bool, shared: Pass
) -> tuple[Tokens, Signals]:
    """`run_block` where nobody can tell the modules from their parameters."""
    reducer, step, need = shared.reducer, plan.step, plan.need
    if reducer is None:
        x, seen = block.attention(t.x, None, need, 1, shared.own_kernels)
        return t._replace(x=block.mlp(x)), seen
    site = None if step is None else reducer.site
    if site == "pre":
        t, moved = reducer.reduce(t, signals, step), True
    sizes = t.size if reducer.prop_attn and not t.unit else None
    bias = attention_bias(sizes, t.mask, t.x.dtype)
    own = moved or shared.own_kernels
    x, seen = block.attention(t.x, bias, need, shared.class_tokens, own)
    t = t._replace(x=x)
    # The MLP is where memory peaks: hold nothing that it does not need.
    del x
    if site == "mid":
        t = reducer.reduce(t, seen, step)
        if not isinstance(reducer, Follows):
            seen = Signals()
    t = t._replace(x=block.mlp(t.x))
    if site == "post":
        t = reducer.reduce(t, seen, step)
    return _behind(i, t, seen, plan, reducer), seen


def _behind(i: int, t: Tokens, seen: Signals, plan: Plan, reducer: Reducer) -> Tokens:
    if plan.need and isinstance(reducer, Follows):
        t = reducer.observe(t, seen, i)
    return reducer.restore(t) if plan.restore and isinstance(reducer, Parks) else t


def _through_modules(
    i: int, t: Tokens, signals: Signals, plan: Plan, moved: bool, shared: Pass
) -> tuple[Tokens, Signals]:
    """`run_block` in general."""
    block, reducer, step = shared.blocks[i], shared.reducer, plan.step
    adapter = block_adapter(block)
    site = None if reducer is None or step is None else reducer.site
    if site == "pre":
        t = reduce_sparing(reducer, t, signals, step, plan.spared)
        moved = True
    guests = None
    if isinstance(reducer, ExtraKeys) and step is not None and reducer.inside(t):
        guests = reducer.extra_keys(t, step)
    all_ = t if guests is None else append(t, guests)
    own = _own_attention(reducer, all_, step)
    sizes = all_.size if reducer is not None and reducer.prop_attn and not t.unit else None
    bias = attention_bias(sizes, all_.mask, t.x.dtype)
    rope = rope_for(shared.embedded, i, all_, moved or guests is not None)
    shift = _shift(shared.plugins, i, shared.schedule) if shared.plugins else None
    quiet = own is None and t.policy is None and guests is None and shift is None
    quiet = quiet and not plan.need and site not in ("mid", "attn") and plan.rows is None
    # Once tokens have changed, nothing has to equal timm's kernels to the last bit.
    free = (moved or shared.own_kernels) and undisturbed(t.x) and not hooked(block, block.attn)
    if quiet and not free:
        # Nobody listens: run the block as it is.
        extra: dict[str, Any] = {"rope": rope} if adapter.rope else {}
        if bias is not None:
            extra["attn_mask"] = bias if autocasting(t.x) else bias.to(t.x.dtype)
        t = t._replace(x=block(t.x, **extra))
        seen = Signals()
    else:
        listen = partial(
            attend,
            prefix=t.prefix,
            rope=rope,
            bias=bias,
            policy=all_.policy,
            need=plan.need,
            class_tokens=shared.class_tokens,
            own=own,
            rows=plan.rows,
            shift=shift,
            **_rereading(reducer, block, i, site, shared.embedded, shift),
        )
        branch, result = adapter.attn_branch(block, all_.x, listen)
        if guests is not None:
            length = t.x.shape[1]
            branch = branch[:, :length]
            result = result._replace(signals=trim(result.signals, length))
        t = t if result.tokens is None else result.tokens
        if plan.rows is not None:
            t = _first(t, plan.rows)
        t, seen = t._replace(x=t.x + branch), result.signals
        # The MLP is where memory peaks: hold nothing that it does not need.
        del branch, result, listen, own, all_
        if site == "mid":
            t = reduce_sparing(reducer, t, seen, step, plan.spared)
            if not isinstance(reducer, Follows):
                seen = Signals()
        straight = shared.straight[i]
        mlp = partial(adapter.mlp_half, block) if straight is None else straight.mlp
        t = t._replace(x=mlp(t.x))
    if site == "post":
        t = reduce_sparing(reducer, t, seen, step, plan.spared)
    return (t if reducer is None else _behind(i, t, seen, plan, reducer)), seen


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


def _rereading(
    reducer: Reducer | None,
    block: nn.Module,
    i: int,
    site: str | None,
    embedded: Embedded,
    shift: Shift | None,
) -> dict[str, Any]:
    """Arguments of `attend` for a reducer that changes tokens between keys and values."""
    if not isinstance(reducer, OwnAttention) or site != "attn" or reducer.rereads == "no":
        return {}
    adapter, attn = block_adapter(block), block.attn

    def again(t: Tokens, values_only: bool) -> AttentionInput:
        x = adapter.attn_input(block, t.x)
        if shift is not None:
            q, k, v = projection(attn)(attn, x, shift)
        else:
            q, k, v = (without_keys if values_only else projection(attn))(attn, x)
        rope = None if values_only else rope_for(embedded, i, t, True)
        q, k, v = ready(attn, q, k, v, t.prefix, rope)
        sizes = t.size if reducer.prop_attn and not t.unit else None
        bias = attention_bias(sizes, t.mask, t.x.dtype)
        dropout = attn.attn_drop.p if attn.training else 0.0
        return AttentionInput(q, k, v, attn.scale, bias, dropout, attn.fused_attn, frozenset())

    return {"project": without_values, "again": again}


def _own_attention(
    reducer: Reducer | None, t: Tokens, step: Step | None
) -> Callable[[AttentionInput], AttentionOutput | None] | None:
    """The reducer's attention, if its class brings one."""
    if not isinstance(reducer, OwnAttention) or not reducer.inside(t):
        return None
    return lambda given: reducer.attend(given, t, step)


def _first(t: Tokens, rows: int) -> Tokens:
    """Prefix tokens alone, for a head that reads nothing else."""
    mask = None if t.mask is None else t.mask[:, :rows]
    origin = None if t.origin is None else t.origin[:, :0]
    return t._replace(x=t.x[:, :rows], size=t.size[:, :rows], mask=mask, origin=origin)


def checkpointed(function: Callable[..., Any], fast_linear: Mode) -> Callable[..., Any]:
    """A function that keeps its arguments alone for the backward pass, and runs again there."""

    def whole(*args: Any) -> Any:
        # The backward pass runs it again, from wherever that is called.
        with using(fast_linear):
            return function(*args)

    def run(*args: Any) -> Any:
        inner = function if fast_linear == "off" else whole
        return checkpoint(inner, *args, use_reentrant=False)

    return run
