"""Images of very different lengths, run in groups of similar ones.

A method whose counts depend on the image leaves a batch in which every image is padded to the
longest. Where that is much padding, the next blocks run group by group: images sorted by length and
cut into a few groups, each of them padded to the longest of its own. No clock is asked: how to cut
follows from the lengths, by what rows cost. Groups are put together again, in the order of the
batch, where somebody looks at all images: behind a block whose state is kept, and at the end.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reduction.eager import undisturbed
from reduction.mixins.adaptive import Adaptive
from reduction.tokens import Signals, Tokens
from zoo.adapters.hooks import hooked
from zoo.model.lane import Frame, Stage
from zoo.model.stage import run

#: What one more group costs in every block, in rows of that block: weights are read once more.
ROWS = 48
#: And in multiply-accumulates, for narrow models: operations are called once more.
CALLS = 3e7
#: Groups are formed anew only where they save so much of the next block.
MARGIN = 0.08
#: Lengths are rounded up to a multiple. In bfloat16, kernels want no other number of tokens.
STEP = 8
HALF_STEP = 16


class Part(NamedTuple):
    """Some images of a batch, with no more padding than they need.

    Attributes:
        images: Their places in the batch.
        t: Their tokens.
        signals: Of the block before.
    """

    images: Sequence[int]
    t: Tokens
    signals: Signals


class Walk(NamedTuple):
    """What came of a batch.

    Attributes:
        t: Tokens of all images, padded to the longest.
        counts: Tokens `(entering, leaving)` of every block, padding included.
        states: Tokens behind the blocks whose state is kept.
    """

    t: Tokens
    counts: list[tuple[int, int]]
    states: list[Tokens]


def may_run_apart(most: int, frame: Frame, t: Tokens, blocks: Sequence[nn.Module]) -> bool:
    """Whether images may run in groups; `run_apart` asks what takes longer to find out.

    Whoever looks at a block while it runs sees all images of a batch, and so do plugins, and
    methods in which an image depends on others.

    Args:
        most: What `zoo.model.runtime.Runtime.buckets` allows.
        frame: Of this pass.
        t: What enters the first block.
        blocks: Of the backbone.
    """
    reducer = frame.reducer
    if most == 1 or not isinstance(reducer, Adaptive) or reducer.together():
        return False
    if torch.is_grad_enabled() or not undisturbed(t.x) or t.x.shape[0] == 1:
        return False  # in this order: tracers must not be asked for the size of the batch
    plain = frame.bias is None and not frame.embedded.more and not len(frame.plugins)
    unseen = frame.watch is None and frame.note is None
    training = frame.reducer is not None and frame.reducer.training
    return plain and unseen and not (training or any(m.training for m in blocks))


def run_apart(
    stages: Sequence[Stage],
    t: Tokens,
    kept: Container[int],
    most: int,
    blocks: Sequence[nn.Module],
) -> Walk:
    """Run blocks, in groups of images wherever that pays.

    Args:
        stages: What is going to happen.
        t: Tokens entering the first block.
        kept: Blocks behind which the state is kept.
        most: Groups that there may be.
        blocks: Of the backbone. Where somebody waits for a part of them to be called, there is one
            group.
    """
    parts = [Part(range(t.x.shape[0]), t, Signals())]
    counts: list[tuple[int, int]] = []
    states: list[Tokens] = []
    masks: list[Tensor | None] = []
    for stage in stages:
        before, masks = masks, [p.t.mask for p in parts]
        # Lengths that are as they were have been looked at.
        if len(masks) != len(before) or any(a is not b for a, b in zip(masks, before, strict=True)):
            parts = _regrouped(parts, stage, most, blocks)
            masks = [p.t.mask for p in parts]
        entering = _longest(parts)
        parts = [Part(p.images, *run(stage, p.t, p.signals)) for p in parts]
        counts.append((entering, _longest(parts)))
        if stage.block in kept:
            states.append(_together(parts, stage))
    if not stages or stages[-1].block in kept:
        return Walk(states[-1] if states else t, counts, states)
    return Walk(_together(parts, stages[-1]), counts, states)


def cuts(lengths: Sequence[int], most: int, width: int, step: int) -> tuple[list[int], float]:
    """How to cut a batch into groups of similar length.

    Args:
        lengths: Of the images, prefix included.
        most: Groups that there may be.
        width: C.
        step: Groups are as long as a multiple of this.

    Returns:
        The length of each group, ascending, of which an image is in the first that holds it; and
        what they cost, see `cost`.
    """
    levels = sorted({-(-n // step) * step for n in lengths})
    below = [sum(n <= level for n in lengths) for level in levels]
    # By number of groups and last level: the least cost, and where the group before ends.
    first = [(cost(count, n, width), -1) for count, n in zip(below, levels, strict=True)]
    table = [first]
    for _ in range(1, min(most, len(levels))):
        row = [first[0]]
        for i in range(1, len(levels)):
            row.append(
                min(
                    (table[-1][j][0] + cost(below[i] - below[j], levels[i], width), j)
                    for j in range(i)
                )
            )
        table.append(row)
    groups = min(range(len(table)), key=lambda g: table[g][-1][0])
    best, i, ends = table[groups][-1][0], len(levels) - 1, []
    while i >= 0:
        ends.append(levels[i])
        i = table[groups][i][1]
        groups -= 1
    return ends[::-1], best


def cost(images: int, length: int, width: int) -> float:
    """Of a group in one block, in rows of its linear layers.

    Args:
        images: How many.
        length: Their tokens, prefix and padding included.
        width: C.
    """
    return images * length * (1 + length / (6 * width)) + ROWS + CALLS / (12 * width * width)


def _regrouped(
    parts: list[Part], stage: Stage, most: int, blocks: Sequence[nn.Module]
) -> list[Part]:
    """The same images in other groups, if those save enough of this block."""
    if stage.before is not None or not _may_be_cut(parts, stage):
        return parts  # signals of the block before, which are read now, stay with their tokens
    t = parts[0].t
    width, step = t.x.shape[2], HALF_STEP if t.x.dtype == torch.bfloat16 else STEP
    now = sum(cost(len(p.images), p.t.x.shape[1], width) for p in parts)
    lengths = {i: n for p in parts for i, n in zip(p.images, _lengths(p.t), strict=True)}
    # Each image in a group of its own that costs nothing: no grouping is cheaper.
    floor = sum(cost(1, n, width) - cost(0, 0, width) for n in lengths.values())
    if floor + 2 * cost(0, 0, width) > (1 - MARGIN) * now:
        return parts
    ends, best = cuts(list(lengths.values()), most, width, step)
    if best > (1 - MARGIN) * now or hooked(*(part for b in blocks for part in b.modules())):
        return parts
    whole = _together(parts, stage)
    groups: dict[int, list[int]] = {end: [] for end in ends}
    for i in sorted(lengths):
        groups[next(end for end in ends if lengths[i] <= end)].append(i)
    # The longest keep the length of the batch, so that it is seen from outside as it was.
    limits = [min(end, whole.x.shape[1]) for end in ends[:-1]] + [whole.x.shape[1]]
    by_token = _by_token(stage)
    return [
        Part(images, _cut(whole, images, limit, by_token), Signals())
        for images, limit in zip(groups.values(), limits, strict=True)
    ]


def _may_be_cut(parts: Sequence[Part], stage: Stage) -> bool:
    """Whether there is padding, and everything that these tokens carry can be cut with them."""
    t, rope = parts[0].t, stage.frame.embedded.rope
    if all(p.t.mask is None for p in parts) or t.policy is not None or t.grid is not None:
        return False
    placed = rope is None or (stage.positions_changed and rope.dim() < 4)
    reducer = stage.frame.reducer
    assert isinstance(reducer, Adaptive)
    return placed and (not t.memory or reducer.by_token is not None)


def _by_token(stage: Stage) -> frozenset[str]:
    reducer: Any = stage.frame.reducer
    return reducer.by_token or frozenset()


def _longest(parts: Sequence[Part]) -> int:
    return max(int(p.t.x.shape[1]) for p in parts)


def _lengths(t: Tokens) -> list[int]:
    """Tokens up to the last real one, prefix included, and one row where there is none."""
    batch, n = t.x.shape[:2]
    if t.mask is None:
        return [n] * batch
    rows = torch.arange(1, n + 1, device=t.mask.device)
    found: list[int] = (t.mask * rows).amax(1).clamp_min(min(t.prefix + 1, n)).tolist()
    return found


def _cut(t: Tokens, images: Sequence[int], length: int, by_token: frozenset[str]) -> Tokens:
    """Some images alone, and of them the first rows."""
    index, gone = torch.tensor(images, device=t.x.device), t.x.shape[1] - length

    def taken(x: Tensor | None, tokens: bool = True) -> Tensor | None:
        if x is None:
            return None
        return (x[:, : x.shape[1] - gone] if tokens else x).index_select(0, index)

    x, size, mask = taken(t.x), taken(t.size), taken(t.mask)
    assert x is not None and size is not None
    return t._replace(
        x=x,
        size=size,
        origin=taken(t.origin),
        source=taken(t.source, tokens=False),
        mask=None if mask is None or bool(mask.all()) else mask,
        memory={k: v for k, m in t.memory.items() if (v := taken(m, k in by_token)) is not None},
    )


def _together(parts: Sequence[Part], stage: Stage) -> Tokens:
    """All images again, in the order of the batch, with padding to the longest."""
    if len(parts) == 1:
        return parts[0].t
    t, longest, by_token = parts[0].t, _longest(parts), _by_token(stage)
    place = torch.tensor([i for p in parts for i in p.images], device=t.x.device).argsort()

    def all_of(found: Sequence[Any], fill: int | None = 0) -> Tensor:
        if fill is not None:
            rows = [longest - p.t.x.shape[1] for p in parts]
            found = [_padded(x, n, fill) for x, n in zip(found, rows, strict=True)]
        return torch.cat(list(found)).index_select(0, place)

    real = [
        torch.ones_like(p.t.size, dtype=torch.bool) if p.t.mask is None else p.t.mask for p in parts
    ]
    whole = all(p.t.mask is None and p.t.x.shape[1] == longest for p in parts)
    return t._replace(
        x=all_of([p.t.x for p in parts]),
        size=all_of([p.t.size for p in parts]),
        unit=all(p.t.unit for p in parts),
        origin=None if t.origin is None else all_of([p.t.origin for p in parts], -1),
        source=None if t.source is None else all_of([p.t.source for p in parts], None),
        mask=None if whole else all_of(real),
        memory={
            k: all_of([p.t.memory[k] for p in parts], 0 if k in by_token else None)
            for k in t.memory
        },
    )


def _padded(x: Tensor, rows: int, fill: int) -> Tensor:
    """`rows` more of them in the second dimension."""
    return x if not rows else F.pad(x, (0, 0) * (x.dim() - 2) + (0, rows), value=fill)
