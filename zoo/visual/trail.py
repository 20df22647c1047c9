"""What became of every patch of an image, block by block."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from reduction.assignment import Mix
from reduction.mixins.adaptive import Adaptive
from reduction.mixins.gating import Gates
from reduction.mixins.parking import Parks
from reduction.tokens import Tokens
from zoo.errors import ZooError
from zoo.model.attached import as_reduced
from zoo.model.evaluating import evaluating
from zoo.model.maps import attention_maps
from zoo.model.reduced import ReducedViT
from zoo.model.selecting import SelectingTower
from zoo.model.stream import flow

Array = np.ndarray[Any, Any]


class State(NamedTuple):
    """Where the patches of one image are at one point of the pass.

    Attributes:
        label: Which point, such as "block 3".
        source: Token that stands for each patch, `(N0,)`; -1 where none does.
        tokens: How many there are, prefix tokens included.
        kept: Patches that a selector kept as they are, `(N0,)` bool; None where any patch whose
            token stands for it alone is one.
        heat: Share of each patch in all tokens, `(N0,)` from 0 to 1, where tokens are mixtures of
            all patches; None otherwise.
        attention: What the class token pays to each patch, `(N0,)`, a mean over heads.
    """

    label: str
    source: Array
    tokens: int
    kept: Array | None = None
    heat: Array | None = None
    attention: Array | None = None


class Trail(NamedTuple):
    """One image on its way through one model.

    Attributes:
        name: What the model is called.
        grid: Rows and columns of patches.
        states: The first is the image as it enters, one for each block, then those of a selector.
        remarks: What has to be known to read the picture.
    """

    name: str
    grid: tuple[int, int]
    states: list[State]
    remarks: list[str]

    @property
    def counts(self) -> list[int]:
        """Tokens at every state."""
        return [state.tokens for state in self.states]


#: A name, and the tokens to keep, for several choices of one selector.
Choice = tuple[str, int | float | None]


@torch.no_grad()
def follow(
    model: nn.Module,
    images: Tensor,
    name: str,
    attention: bool = False,
    keeps: Sequence[int | float | None] = (),
) -> list[Trail]:
    """Run a model and note what becomes of each patch.

    Args:
        model: A `ReducedViT`, a supported backbone, one with a reducer in place, or a
            `SelectingTower`.
        images: `(B, C, H, W)`, as the model takes them.
        name: What to call it.
        attention: Also note what the class token attends to.
        keeps: Numbers of tokens, or shares, for a selector; none is its own.

    Returns:
        One trail for each image.

    Raises:
        UnsupportedModel: If the model cannot be run block by block.
        ZooError: If the images do not fit, or there is no class token whose attention could be
            drawn.
    """
    chooser = model if isinstance(model, SelectingTower) else None
    inner = as_reduced(model if chooser is None else chooser.tower)
    until = None if chooser is None else chooser.block
    with evaluating(model, inner):
        trails = _through(inner, images, name, until)
        if chooser is not None:
            for keep in keeps or [chooser.keep]:
                _choose(chooser, images, keep, trails)
        if attention:
            _attend(inner, images, trails)
    return trails


def _through(model: ReducedViT, images: Tensor, name: str, until: int | None = None) -> list[Trail]:
    model.checked(images, {"zoo.visualize": True})
    reducer = model.reducer
    mixed: dict[int, Tensor] = {}
    parked: dict[int, Tokens] = {}

    def note(block: int, before: Tokens, behind: Tokens) -> None:
        if isinstance(reducer, Parks) and behind.n > before.n:
            parked[block] = before  # seen from inside: behind the block all are back

    twin = _overheard(model, mixed)
    out = flow(twin, images, track=True, trace=True, until=until, note=note)
    rows, columns = out.info.grid
    trails = []
    soft = _soft_shares(mixed, out.info.trace, rows * columns)
    for i in range(len(images)):
        start = State("input", np.arange(rows * columns), rows * columns + model.prefix)
        states = [start]
        for block, t in enumerate(out.info.trace):
            shown = parked.get(block, t)
            states.append(_state(f"block {block}", shown, i, soft.get(block)))
        trails.append(Trail(name, (rows, columns), states, _remarks(model, states)))
    return trails


def _state(label: str, t: Tokens, i: int, heat: Tensor | None) -> State:
    assert t.source is not None
    source = t.source[i].cpu().numpy()
    tokens = t.x.shape[1] if t.mask is None else int(t.mask[i].sum())
    shares = None if heat is None else heat[min(i, len(heat) - 1)].cpu().numpy()
    return State(label, source, tokens, heat=shares)


def _remarks(model: ReducedViT, states: Sequence[State]) -> list[str]:
    reducer, found = model.reducer, []
    mixtures = any(state.heat is not None for state in states)
    if isinstance(reducer, Gates):
        found.append(
            "parts of blocks are switched on and off, and all tokens stay: nothing to draw"
        )
    if isinstance(reducer, Parks):
        found.append("dark patches are set aside and come back later")
    if isinstance(reducer, Adaptive):
        found.append("the number of tokens depends on the image")
    if mixtures:
        found.append(
            "tokens are mixtures of all patches: brightness is the share of a patch in them"
        )
    elif any(_slots(state) + model.prefix < state.tokens for state in states):
        found.append("patches have shares in several tokens: each is drawn in that of its largest")
    return found


def _slots(state: State) -> int:
    """Tokens that stand for some patch."""
    return len(set(state.source[state.source >= 0].tolist()))


# ------------------------------------------------------------------------- mixtures


def _overheard(model: ReducedViT, mixed: dict[int, Tensor]) -> ReducedViT:
    """The same model with a reducer whose mixtures are noted; the model itself stays as it is."""
    reducer = model.reducer
    if reducer is None:
        return model
    spy = copy.copy(reducer)
    assign: Callable[..., Any] = reducer.assign

    def listening(t: Tokens, s: Any, step: Any) -> Any:
        answer = assign(t, s, step)
        if isinstance(answer, Mix):
            mixed[step.block] = answer.weights.detach().float().abs()
        return answer

    spy.__dict__["assign"] = listening
    twin = copy.copy(model)
    twin.__dict__["_modules"] = {**model._modules, "reducer": spy}
    return twin


def _soft_shares(
    mixed: dict[int, Tensor], trace: Sequence[Tokens], patches: int
) -> dict[int, Tensor]:
    """By block: how much each patch counts in all tokens, `(B, N0)`; the largest of an image is 1.

    Empty unless every reduction so far was a mixture, whose weights multiply.
    """
    found: dict[int, Tensor] = {}
    total: Tensor | None = None
    for block in range(len(trace)):
        if block in mixed:
            weights = mixed[block]
            weights = weights if weights.dim() == 3 else weights.unsqueeze(0)
            if weights.shape[2] != (patches if total is None else total.shape[1]):
                return found
            total = weights if total is None else weights @ total
        if total is not None:
            share = total.sum(1)
            found[block] = share / share.amax(1, keepdim=True).clamp_min(1e-12)
    return found


# ------------------------------------------------------------------------- selectors


def _choose(
    chooser: SelectingTower, images: Tensor, keep: int | float | None, trails: list[Trail]
) -> None:
    """Add what a selector leaves of each image."""
    own = copy.copy(chooser)
    own.keep = keep
    found = own.select(images)
    name = chooser.selector.name
    mask = found.mask()
    for i, trail in enumerate(trails):
        slot, kept = (part[i].cpu().numpy() for part in (found.slot, mask))
        if chooser.group > 1:
            slot, kept = (_of_patches(part, chooser, trail.grid) for part in (slot, kept))
        rows = int(found.valid[i])
        trail.states.append(State(f"{name} {rows}", slot, rows, kept=kept))


def _of_patches(values: Array, chooser: SelectingTower, grid: tuple[int, int]) -> Array:
    """Values of groups as values of their patches."""
    if chooser.group_order == "runs":
        return values.repeat(chooser.group)
    side = int(chooser.group**0.5)
    rows, columns = grid
    field = values.reshape(rows // side, columns // side)
    return np.kron(field, np.ones((side, side), dtype=field.dtype)).reshape(-1)


# ------------------------------------------------------------------------- attention


def _attend(model: ReducedViT, images: Tensor, trails: list[Trail]) -> None:
    """Add what the class token attends to, block by block."""
    if not model.tower.class_tokens(model.backbone):
        raise ZooError(
            f"attention: a {type(model.backbone).__name__} has no class token whose attention "
            "could be drawn; leave it out"
        )
    maps = attention_maps(model, images, queries=1)
    for i, trail in enumerate(trails):
        for block, found in enumerate(maps[: len(trail.states) - 1]):
            if block + 1 < len(trail.states) and trail.states[block + 1].label.startswith("block"):
                seen = found.on_patches()[i].float().mean(0).flatten().cpu().numpy()
                state = trail.states[block + 1]
                trail.states[block + 1] = state._replace(attention=seen)
