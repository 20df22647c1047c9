"""One image at one point of the pass: its patches kept, merged and dropped, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from zoo.visual.trail import State

Array = np.ndarray[Any, Any]

#: What is left of a dropped patch, and what it is mixed with.
GHOST, DARK = 0.16, (16, 18, 24)


class Fate(NamedTuple):
    """What became of each patch, `(N0,)` bool each: exactly one of them is true.

    Attributes:
        kept: Its token stands for it alone.
        merged: Its token stands for others as well.
        dropped: No token stands for it.
    """

    kept: Array
    merged: Array
    dropped: Array

    def counts(self) -> tuple[int, int, int]:
        """How many patches each."""
        return int(self.kept.sum()), int(self.merged.sum()), int(self.dropped.sum())


def fate_of(state: State) -> Fate:
    """What became of each patch."""
    source = state.source
    held = source >= 0
    members = np.bincount(source[held], minlength=1)
    many = np.zeros(len(source), dtype=bool)
    many[held] = members[source[held]] > 1
    if state.kept is not None:  # a selector's: what is not among the kept went into another token
        return Fate(state.kept, held & ~state.kept, ~held & ~state.kept)
    return Fate(held & ~many, many, ~held)


def describe(state: State, first: int) -> str:
    """The state in a few words.

    Args:
        state: Which.
        first: Tokens at the start, prefix tokens included.
    """
    if state.heat is not None:
        return f"{state.tokens} of {first} tokens, mixtures"
    kept, merged, dropped = fate_of(state).counts()
    parts = [f"{state.tokens} of {first} tokens"]
    parts += [f"{merged} patches merged"] if merged else []
    parts += [f"{dropped} dropped"] if dropped else []
    return ", ".join(parts)


def cell_means(pixels: Array, grid: tuple[int, int]) -> Array:
    """Mean colour of every cell, `(N0, 3)`."""
    rows, columns = grid
    height, width = pixels.shape[0] // rows, pixels.shape[1] // columns
    cells = pixels[: rows * height, : columns * width].astype(np.float32)
    cells = cells.reshape(rows, height, columns, width, 3)
    return cells.mean(axis=(1, 3)).reshape(-1, 3)


def draw(picture: Image.Image, grid: tuple[int, int], state: State, cell: int) -> Image.Image:
    """A photograph with what became of its patches.

    Kept patches are the photograph; merged ones have the mean colour of their token and an outline;
    dropped ones are dark. Where tokens are mixtures, brightness is each patch's share in them.

    Args:
        picture: What the patches cover.
        grid: Rows and columns of patches.
        state: What to draw.
        cell: Side of a patch in the drawing, in pixels.
    """
    rows, columns = grid
    field = scaled(picture, grid, cell)
    pixels = np.asarray(field).astype(np.float32)
    dark = np.array(DARK, dtype=np.float32)
    if state.heat is not None:
        bright = _spread(0.08 + 0.92 * state.heat.reshape(grid), cell)[..., None]
        return _image(pixels * bright + dark * (1 - bright))
    fate, means = fate_of(state), cell_means(pixels, grid)
    flat = np.zeros((rows * columns, 3), dtype=np.float32)
    if fate.merged.any():
        flat[fate.merged] = _group_means(means, state.source)[fate.merged]
    merged, dropped = (_spread(part.reshape(grid), cell) for part in (fate.merged, fate.dropped))
    out = np.where(merged[..., None], _spread(flat.reshape(rows, columns, 3), cell), pixels)
    if state.kept is not None:  # the patches of a selector that are summed up elsewhere stay seen
        kept = _spread(state.kept.reshape(grid), cell)
        out = np.where((merged & ~kept)[..., None], 0.55 * out + 0.45 * dark, out)
    grey = pixels.mean(axis=2, keepdims=True)
    ghost = GHOST * grey + (1 - GHOST) * dark + _hatch(pixels.shape[:2])
    out = np.where(dropped[..., None], ghost, out)
    _outline(out, state.source.reshape(grid), fate.merged.reshape(grid), cell)
    return _image(out)


def scaled(picture: Image.Image, grid: tuple[int, int], cell: int) -> Image.Image:
    """The picture with so many pixels for a patch; small ones stay sharp."""
    size = (grid[1] * cell, grid[0] * cell)
    small = picture.width * 2 < size[0]
    return picture.resize(size, Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS)


def heat_map(picture: Image.Image, grid: tuple[int, int], values: Array, cell: int) -> Image.Image:
    """A photograph under a map of numbers: the smallest dark, the largest bright yellow."""
    pixels = np.asarray(scaled(picture, grid, cell)).astype(np.float32)
    colors = _spread(_flame(stretched(values).reshape(grid)), cell)
    grey = pixels.mean(axis=2, keepdims=True)
    return _image(0.3 * grey + 0.7 * colors)


def stretched(values: Array) -> Array:
    """Numbers on a scale from 0 to 1; nothing is 0, and few large ones do not hide the others."""
    some = values[values > 0]
    if not len(some):
        return np.zeros_like(values)
    low, high = float(np.quantile(some, 0.02)), float(np.quantile(some, 0.99))
    if high <= low:
        return (values > 0).astype(values.dtype)
    return np.where(values > 0, 0.08 + 0.92 * np.clip((values - low) / (high - low), 0, 1), 0.0)


def _flame(share: Array) -> Array:
    """Numbers from 0 to 1 as colours: night blue, violet, orange, yellow."""
    stops = np.array([[13, 12, 40], [96, 28, 110], [196, 58, 74], [245, 148, 40], [252, 244, 150]])
    place = share * (len(stops) - 1)
    low = np.minimum(place.astype(int), len(stops) - 2)
    part = (place - low)[..., None]
    return (stops[low] * (1 - part) + stops[low + 1] * part).astype(np.float32)


def _group_means(means: Array, source: Array) -> Array:
    """Mean colour of the group that each patch is in, `(N0, 3)`."""
    held = source >= 0
    groups = int(source.max()) + 1
    count = np.maximum(np.bincount(source[held], minlength=groups), 1)
    sums = np.stack(
        [np.bincount(source[held], means[held, c], minlength=groups) for c in range(3)], axis=1
    )
    return (sums / count[:, None])[np.maximum(source, 0)]


def _spread(values: Array, cell: int) -> Array:
    """One value per patch as one per pixel."""
    return values.repeat(cell, axis=0).repeat(cell, axis=1)


def _hatch(shape: tuple[int, int]) -> Array:
    """Thin slanted lines, so that what was dropped is no dark part of the photograph."""
    y, x = np.indices(shape)
    return np.where((x + y) % 9 == 0, 44.0, 0.0)[..., None]


def _outline(pixels: Array, source: Array, merged: Array, cell: int) -> None:
    """Draw a line around every group, in place."""
    line = 1 if cell < 20 else 2
    light = np.array([250, 250, 252], dtype=np.float32)
    strength = 0.75 if cell >= 12 else 0.55

    def mark(region: tuple[slice, slice]) -> None:
        pixels[region] = strength * light + (1 - strength) * pixels[region]

    rows, columns = source.shape
    for y, x in _edges(source, merged, axis=1):
        mark((slice(y * cell, (y + 1) * cell), slice((x + 1) * cell - line, (x + 1) * cell)))
    for y, x in _edges(source, merged, axis=0):
        mark((slice((y + 1) * cell - line, (y + 1) * cell), slice(x * cell, (x + 1) * cell)))


def _edges(source: Array, merged: Array, axis: int) -> Sequence[tuple[int, int]]:
    """Places of which the next one along an axis is in another group, one of the two merged."""
    first = [slice(None), slice(None)]
    second = list(first)
    first[axis], second[axis] = slice(None, -1), slice(1, None)
    one, other = tuple(first), tuple(second)
    apart = (source[one] != source[other]) & (merged[one] | merged[other])
    return [(int(y), int(x)) for y, x in np.argwhere(apart)]


def _image(pixels: Array) -> Image.Image:
    return Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8), "RGB")
