"""One block with its reduction: decided once per forward pass by `stages`, then `run`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from reduction.base import Reducer
from reduction.counts import Step
from reduction.eager import undisturbed
from reduction.functional.carriers import join_tail, split_tail, trim
from reduction.mixins.attention import InAttention
from reduction.mixins.following import Follows
from reduction.mixins.gating import Gates
from reduction.mixins.masking import Masked
from reduction.mixins.parking import Parks
from reduction.tokens import OF_THE_MLP, Signals, Tokens
from zoo.adapters.blocks import block_adapter
from zoo.adapters.fast_linear import Mode, using
from zoo.adapters.hooks import called, hooked
from zoo.errors import ZooError
from zoo.model.halves import Halves, Whole
from zoo.model.lane import NOBODY, Frame, Hear, Lane, Note, Reduce, Stage
from zoo.model.plan import Plan
from zoo.model.straight import Line, straight_blocks

_NONE = Signals()


def run(stage: Stage, t: Tokens, signals: Signals) -> tuple[Tokens, Signals]:
    """One block with its reduction: the unit of gradient checkpointing.

    Behind a large product the interpreter finds its caches cold, and a question costs as much as a
    small operation: whatever can be asked before is an attribute of the stage.

    Args:
        stage: What is going to happen.
        t: Tokens entering the block.
        signals: Of the block before.

    Returns:
        Tokens leaving the block, and its signals.
    """
    lane, step = stage.lane, stage.plan.step
    if stage.before is not None:
        t = stage.before(t, signals, step)
    if stage.asks and (t.policy is not None or (stage.inside and stage.inside.inside(t))):
        lane = stage.halves
    if stage.shows_input:
        entered = t.x
        t, seen = lane.attention(t, stage)
        seen = seen._replace(x_in=entered)
    else:
        t, seen = lane.attention(t, stage)
    if stage.between is not None:
        t = stage.between(t, seen, step)
        if not stage.keeps:
            seen = _NONE  # the MLP is where memory peaks: hold nothing that it does not need
    if stage.gates is not None:
        t = t._replace(x=lane.mlp_gated(t.x, stage.gates.mlp_gates(t)))
        t = stage.gates.ungate(t)
    elif stage.shows_mlp:
        before = t.x
        x, branch = lane.mlp_seen(before)
        t, seen = t._replace(x=x), seen._replace(x_mid=before, mlp=branch)
    else:
        t = t._replace(x=lane.mlp(t.x))
    if stage.behind is not None:
        t = stage.behind(t, seen, step)
    return t, seen


def run_hooked(
    blocks: Sequence[nn.Module], stage: Stage, t: Tokens, signals: Signals
) -> tuple[Tokens, Signals]:
    """`run`, and the hooks of the block fire.

    They see what goes in behind a reduction at its input, and what comes out before one at its
    output.

    Args:
        blocks: Of the backbone.
        stage: See `run`, as for the others.
        t: Tokens entering.
        signals: Of the block before.

    Raises:
        ZooError: If a hook changes the number of tokens, or their width.
    """
    step = stage.plan.step
    if stage.before is not None:
        t = stage.before(t, signals, step)
    inner = stage._replace(before=None, behind=None)
    found: list[tuple[Tokens, Signals]] = []

    def work(x: Tensor) -> Tensor:
        found.append(run(inner, t._replace(x=x), signals))
        return found[-1][0].x

    x = called(blocks[stage.block], work, t.x)
    out, seen = found[-1]
    if x.shape != out.x.shape:
        raise ZooError(
            f"a hook on block {stage.block} must answer with the shape {tuple(out.x.shape)} that "
            f"the block put out, got {tuple(x.shape)}"
        )
    out = out._replace(x=x)
    return (out if stage.behind is None else stage.behind(out, seen, step)), seen


def stages(
    blocks: Sequence[nn.Module],
    plans: Sequence[Plan],
    frame: Frame,
    t: Tokens,
    patches: int,
    hear: Hear = NOBODY,
) -> list[Stage]:
    """Decide what happens in every block of a forward pass.

    Args:
        blocks: Of the backbone.
        plans: One per block.
        frame: What the blocks share.
        t: What enters the first.
        patches: Tokens that the embedding made, plugins apart.
        hear: Signals that are wanted of blocks, beside those that the reducer reads.
    """
    reducer, depth = frame.reducer, len(blocks)
    inside = reducer if isinstance(reducer, InAttention) else None
    asks = inside is not None or isinstance(reducer, Masked) or t.policy is not None
    plain = not frame.plugins and frame.embedded.rope is None and frame.bias is None
    free = undisturbed(t.x)
    changed = t.n != patches or plans[0].entry is not None
    out = []
    for i, (block, plan, straight) in enumerate(
        zip(blocks, plans, straight_blocks(blocks, t.x), strict=True)
    ):
        step = plan.step
        site = None if reducer is None or step is None else reducer.site
        reduce = None if site is None else _bound(reducer, plan.spared)
        if frame.note is not None and reduce is not None and site != "attn":
            reduce = partial(_noted, frame.note, i, reduce)
        follows = reducer if isinstance(reducer, Follows) and plan.need else None
        parks = reducer if isinstance(reducer, Parks) and plan.restore else None
        if i in hear:
            plan = plan._replace(need=plan.need | hear[i])
        changed = changed or site == "pre"
        adapter = block_adapter(block)
        # Where the block itself is the attention, its hooks are called around it.
        attn = adapter.attn(block)
        watched = straight is None and attn is not block and hooked(attn)
        halves = Halves(block, adapter, straight, watched)
        lane: Lane = halves
        listened = plan.need or plan.rows is not None or site in ("mid", "attn") or frame.watch
        shifted = any(p.shift(i, frame.schedule) is not None for p in frame.plugins)
        usual = plain and plan.rows is None and frame.watch is None
        if straight is not None and usual and not _MAPS & plan.need:
            lane = Line(straight)
        elif not listened and not shifted and site != "attn":
            # Once tokens have changed, nothing has to equal the tower's kernels to the last bit.
            own = (changed or frame.own_kernels) and free
            # Sizes, which only tokens that have changed come with, must reach the attention.
            own = own or (changed and (not adapter.masks or frame.bias is not None))
            whole = block.forward if straight is None and hooked(block) else block
            lane = halves if own else Whole(whole, adapter)
        out.append(
            Stage(
                block=i,
                plan=plan,
                frame=frame,
                lane=lane,
                halves=halves,
                positions_changed=changed,
                before=reduce if site == "pre" else None,
                between=reduce if site == "mid" else None,
                behind=_behind(i, reduce if site == "post" else None, follows, parks, frame.note),
                asks=asks and lane is not halves,
                inside=inside,
                keeps=follows is not None or i in hear,
                shows_mlp=bool(OF_THE_MLP & plan.need),
                shows_input="x_in" in plan.need,
                gates=reducer if isinstance(reducer, Gates) and step is not None else None,
            )
        )
        added = sum(p.added(i, depth) for p in frame.plugins)
        changed = changed or step is not None or added > 0
    return out


#: Signals for which an attention goes through modules.
_MAPS = frozenset({"attn", "out"})


def _bound(reducer: Any, tail: int) -> Reduce:
    return partial(reduce_protecting, reducer, tail) if tail else reducer.reduce


def _behind(
    block: int,
    reduce: Reduce | None,
    follows: Follows | None,
    parks: Parks | None,
    note: Note | None = None,
) -> Reduce | None:
    """What happens when a block is over, in this order."""
    acts = [] if reduce is None else [reduce]
    if follows is not None:
        acts.append(partial(_observe, follows, block))
    if parks is not None:
        acts.append(partial(_restore, parks, block, note))
    return partial(_in_turn, acts) if len(acts) > 1 else next(iter(acts), None)


def _observe(follows: Follows, block: int, t: Tokens, s: Signals, step: Any) -> Tokens:
    return follows.observe(t, s, block)


def _restore(
    parks: Parks, block: int, note: Note | None, t: Tokens, s: Signals, step: Any
) -> Tokens:
    back = parks.restore(t)
    if note is not None:
        note(block, t, back)
    return back


def _noted(note: Note, block: int, reduce: Reduce, t: Tokens, s: Signals, step: Any) -> Tokens:
    behind = reduce(t, s, step)
    note(block, t, behind)
    return behind


def _in_turn(acts: Sequence[Reduce], t: Tokens, s: Signals, step: Any) -> Tokens:
    for act in acts:
        t = act(t, s, step)
    return t


def reduce_protecting(reducer: Reducer, tail: int, t: Tokens, s: Signals, step: Step) -> Tokens:
    """Let a reducer have all tokens but the last `tail`, which stay behind what is left."""
    body, rest = split_tail(t, tail)
    return join_tail(reducer.reduce(body, trim(s, body.x.shape[1]), step), rest)


def checkpointed(function: Callable[..., Any], linear: Mode) -> Callable[..., Any]:
    """A function that keeps its arguments alone for the backward pass, and runs again there."""

    def whole(*args: Any) -> Any:
        # The backward pass runs it again, from wherever that is called.
        with using(linear):
            return function(*args)

    def again(*args: Any) -> Any:
        inner = function if linear == "plain" else whole
        return checkpoint(inner, *args, use_reentrant=False)

    return again
