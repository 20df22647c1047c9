"""From images to logits: in through the embedding, through the stages, and out through the head."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from reduction.assignment import apply
from reduction.counts import Step
from reduction.eager import traced
from reduction.mixins.answer import OwnAnswer
from reduction.mixins.entry import AtEmbedding, AtInput, Embedding
from reduction.mixins.following import Extends, Remembers
from reduction.mixins.images import SeesImages
from reduction.schedules.base import Schedule
from reduction.tokens import Signals, Tokens
from zoo.adapters.hooks import hooked
from zoo.adapters.tower import Embedded
from zoo.errors import ZooError
from zoo.model.buckets import may_run_apart, run_apart
from zoo.model.heard import warn_unheard
from zoo.model.lane import NOBODY, Frame, Hear, Note, Watch
from zoo.model.recorded import for_tracers
from zoo.model.runtime import BUCKETS
from zoo.model.stage import checkpointed, run, run_hooked, stages

if TYPE_CHECKING:
    from zoo.model.reduced import ReducedViT


NOTHING: Mapping[str, Any] = MappingProxyType({})


class Info(NamedTuple):
    """What happened to the tokens in one forward pass.

    Attributes:
        tokens: `(entering, leaving)` per block, prefix tokens included.
        size: Patches that each final token stands for, `(B, P+N)`.
        source: Final slot of each input patch `(B, N0)`, -1 where it was dropped. Slots count
            reducible tokens from 0.
        grid: Patch grid `(rows, columns)`.
        trace: State after each block, if asked for with `return_info="trace"`.
        final: State after the last block, before the final norm.
    """

    tokens: tuple[tuple[int, int], ...]
    size: Tensor
    source: Tensor
    grid: tuple[int, int]
    trace: tuple[Tokens, ...]
    final: Tokens

    @property
    def sizes(self) -> Tensor:
        """Another name of `size`."""
        return self.size


class Outflow(NamedTuple):
    """What comes out behind the last block.

    Attributes:
        t: Tokens before the final norm.
        info: What happened to them.
        memories: Of the plugins.
        heard: By block: tokens that entered it, and what its attention said, where that was asked
            for.
        entered: Tokens that entered the first block, where the state behind all is kept.
    """

    t: Tokens
    info: Info
    memories: Sequence[Any]
    heard: Mapping[int, tuple[Tokens, Signals]] = MappingProxyType({})
    entered: Tokens | None = None


def flow(
    model: ReducedViT,
    images: Tensor,
    track: bool = False,
    trace: bool | Collection[int] = False,
    schedule: Schedule | None = None,
    last_block: str = "full",
    until: int | None = None,
    watch: Watch | None = None,
    hear: Hear = NOBODY,
    options: Mapping[str, Any] = NOTHING,
    note: Note | None = None,
) -> Outflow:
    """Run the blocks.

    Args:
        model: Whose.
        images: `(B, 3, H, W)`, checked.
        track: Keep the source map.
        trace: Keep the state behind every block, or behind these.
        schedule: Another one than the model's.
        last_block: See `zoo.model.runtime.Runtime`.
        until: Stop behind this block; None runs all.
        watch: Wants the attention weights of every block.
        hear: Signals of blocks that are wanted beside those that the reducer reads.
        options: What else the embedding of this family takes.
        note: Wants the tokens before and behind every reduction.
    """
    if traced():
        images = for_tracers(images)
    else:
        warn_unheard(model)
    reducer, schedule = model.reducer, schedule or model.schedule
    m, tower = model.backbone, model.tower
    grid = tower.grid_of(m, images, **options)
    embedded = tower.embed(m, images, **options)
    patches = embedded.x.shape[1] - model.prefix
    plans = model.planner.plan(model.anatomy, schedule, grid, patches, last_block)
    t = _start(model, embedded, grid, track)
    if (step := plans[0].entry) is not None:
        t = _reduced(model, t, images, grid, step, note, options)
    t, memories = _enter(model, images, t)
    # Without its features, so that no later block holds on to them.
    frame = _frame(model, embedded._replace(x=None), watch, note)
    del embedded
    entered = t if trace is True else None
    blocks = tower.blocks(m)
    block = run
    if hooked(*blocks):
        block = partial(run_hooked, blocks)
    if tower.checkpointing(m) and torch.is_grad_enabled() and watch is note is None:
        block = checkpointed(block, model.runtime.linear)
    kept = range(len(blocks)) if trace is True else (trace or ())
    counts: list[tuple[int, int]] = []
    states: list[Tokens] = []
    signals = Signals()
    heard: dict[int, tuple[Tokens, Signals]] = {}
    whole = stages(blocks, plans, frame, t, patches, hear)
    whole = whole[: None if until is None else until + 1]
    most = BUCKETS[model.runtime.buckets]
    if block is run and not hear and may_run_apart(most, frame, t, blocks):
        t, counts, states = run_apart(whole, t, kept, most, blocks)
        whole = []
    for stage in whole:
        before, entering = t, t.x.shape[1]
        t, signals = block(stage, t, signals)
        if stage.block in hear:
            heard[stage.block] = before, signals
        length = t.x.shape[1]
        for i, plugin in enumerate(frame.plugins):
            t, memories[i] = plugin.after(stage.block, t, memories[i])
        added = t.x.shape[1] - length
        if added and isinstance(reducer, Extends):
            t = reducer.extended(t, added)
        counts.append((entering, length + added))
        if stage.block in kept:
            states.append(t)
    if isinstance(reducer, OwnAnswer) and until is None:
        t = reducer.finish(t)
    source = t.source if t.source is not None else t.size.new_zeros(0)
    info = Info(tuple(counts), t.size, source, grid, tuple(states), t)
    return Outflow(t, info, memories, heard, entered)


def _start(model: ReducedViT, embedded: Embedded, grid: tuple[int, int], track: bool) -> Tokens:
    """Tokens as they are embedded, with as much of where they are as anyone will ask for."""
    tower, reducer = model.tower, model.reducer
    patches = embedded.x.shape[1] - model.prefix
    full = patches == grid[0] * grid[1]
    if track and not full:
        raise ZooError(
            "the source map cannot be tracked while patch dropout removes tokens; call without "
            "return_info, or in evaluation mode"
        )
    changes = reducer is not None or len(model.plugins) > 0
    follow = changes and (embedded.rope is not None or tower.biased(model.backbone))
    follow = follow or (reducer is not None and "origin" in reducer.needs)
    t = Tokens.start(embedded.x, model.prefix, track=track or follow)
    return t._replace(source=t.source if track else None, grid=grid if full else None)


def _reduced(
    model: ReducedViT,
    t: Tokens,
    images: Tensor,
    grid: tuple[int, int],
    step: Step,
    note: Note | None,
    options: Mapping[str, Any],
) -> Tokens:
    """What a method that looks at images leaves of the patches."""
    tower, reducer, m = model.tower, model.reducer, model.backbone
    if not isinstance(reducer, AtInput) or t.grid is None:
        raise ZooError(
            "a method that looks at images needs one token per patch; switch patch dropout off"
        )
    pixels = tower.raster(m, images, grid, **options)
    if isinstance(reducer, AtEmbedding):
        pieces = Embedding(partial(tower.patches, m), partial(tower.positions, m))
        found = reducer.enter(t, pixels, grid, step, pieces)
    else:
        found = apply(t, reducer.look(pixels, grid, step))
    if note is not None:
        note(-1, t, found)
    return found


def _enter(model: ReducedViT, images: Tensor, t: Tokens) -> tuple[Tokens, list[Any]]:
    """Tokens before the first block, and what plugins remember."""
    tower, reducer = model.tower, model.reducer
    memories = []
    for plugin in model.plugins:
        t, memory = plugin.start(t)
        memories.append(memory)
    t = t._replace(x=tower.pre_norm(model.backbone, t.x))
    if isinstance(reducer, SeesImages):
        t = reducer.see(images, t)
    return (reducer.begin(t) if isinstance(reducer, Remembers) else t), memories


def _frame(
    model: ReducedViT, embedded: Embedded, watch: Watch | None, note: Note | None = None
) -> Frame:
    classes = max(1, model.tower.class_tokens(model.backbone))
    own, plugins = model.runtime.own_kernels, list(model.plugins)
    m, tower = model.backbone, model.tower
    bias = partial(tower.bias, m, embedded) if tower.biased(m) else None
    return Frame(model.reducer, plugins, model.schedule, own, embedded, classes, watch, note, bias)


def leave(model: ReducedViT, out: Outflow) -> Tensor:
    """Logits: of a plugin's head, of the reducer, or of the backbone's own head."""
    own = own_answer(model, out.t, out.memories)
    if own is not None:
        return own
    t = out.t._replace(x=model.tower.norm(model.backbone, out.t.x))
    return model.tower.leave(model.backbone, t)


def own_answer(model: ReducedViT, t: Tokens, memories: Sequence[Any]) -> Tensor | None:
    """Logits of a plugin's head or of the reducer; None where the backbone's head is asked.

    Args:
        model: Whose.
        t: Tokens before the final norm.
        memories: Of the plugins.
    """
    for plugin, memory in zip(model.plugins, memories, strict=True):
        logits = plugin.head(model.backbone, t, memory)
        if logits is not None:
            return logits  # type: ignore[no-any-return]
    if isinstance(model.reducer, OwnAnswer):
        backbone = model.tower.as_timm(model.backbone)
        return model.reducer.logits(backbone, t)
    return None
