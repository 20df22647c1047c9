"""The sheet: every model a band of drawings, block by block, and a plot of the tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from zoo.errors import ZooError
from zoo.visual.drawing import DARK, GHOST, describe, draw, heat_map
from zoo.visual.trail import State, Trail

_INK, _MUTED, _GRID, _PAPER = "#1c2430", "#5d6773", "#e1e5ea", "#ffffff"
COLORS = ("#2563d9", "#d9630b", "#1f8f4d", "#8b3fd6", "#c81e5b", "#0b8793", "#7d5222", "#6f8700")
_GAP, _EDGE = 14, 28


class Strip(NamedTuple):
    """One model's drawings of one image.

    Attributes:
        trail: What happened.
        picture: What its patches cover.
    """

    trail: Trail
    picture: Image.Image


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def chosen_states(trail: Trail, most: int) -> list[int]:
    """Which states a sheet shows: the first, those in which something changed, and the last.

    Args:
        trail: Of an image.
        most: No more than so many, evenly spread; at least 2.

    Raises:
        ZooError: If `most` is less.
    """
    if most < 2:
        raise ZooError(f"most is {most}, expected at least 2: the input and the end are drawn")
    states = trail.states
    changed = [0]
    for i in range(1, len(states)):
        one, other = states[i - 1], states[i]
        same = len(one.source) == len(other.source) and (one.source == other.source).all()
        # The blocks of a model that reduces nothing all look alike.
        if not same or other.heat is not None or other.kept is not None:
            changed.append(i)
    if changed[-1] != len(states) - 1:
        changed.append(len(states) - 1)
    if len(changed) <= most:
        return changed
    return sorted({changed[round(i * (len(changed) - 1) / (most - 1))] for i in range(most)})


def sheet(
    strips: Sequence[Strip],
    title: str,
    panel: int = 224,
    most: int = 7,
    attention: bool = False,
    curves: bool = True,
) -> Image.Image:
    """Draw it.

    Args:
        strips: One for each model.
        title: Headline.
        panel: Width of a drawing, about, in pixels.
        most: Drawings in a band, at least 2.
        attention: Add a band of what the class token attends to.
        curves: Add the plot of tokens per block.
    """
    bands = [band for strip in strips for band in _bands(strip, panel, most, attention)]
    width = max(max(band.width for band in bands), 640) + 2 * _EDGE
    blocks: list[Image.Image] = [_heading(title, strips, width - 2 * _EDGE), *bands]
    if curves:
        trails = [strip.trail for strip in strips]
        blocks.append(token_plot(trails, min(width - 2 * _EDGE, 900), 260))
    height = sum(block.height + _GAP for block in blocks) + 2 * _EDGE - _GAP
    page = Image.new("RGB", (width, height), _PAPER)
    y = _EDGE
    for block in blocks:
        page.paste(block, (_EDGE, y))
        y += block.height + _GAP
    return page


def row(strip: Strip, panel: int = 112, most: int = 5) -> Image.Image:
    """The drawings of one model in a row, with nothing but their labels.

    Args:
        strip: Which.
        panel: Width of a drawing, about, in pixels.
        most: Drawings, at least 2.
    """
    trail, grid = strip.trail, strip.trail.grid
    cell = max(2, round(panel / max(grid)))
    shown = [trail.states[i] for i in chosen_states(trail, most)]
    drawings = [draw(strip.picture, grid, state, cell) for state in shown]
    wide, tall = drawings[0].size
    gap = 6
    page = Image.new("RGB", (len(drawings) * (wide + gap) - gap, tall + 20), _PAPER)
    pen = ImageDraw.Draw(page)
    for i, (state, drawing) in enumerate(zip(shown, drawings, strict=True)):
        page.paste(drawing, (i * (wide + gap), 0))
        text = fitting(pen, _label(state), 12, wide)
        pen.text((i * (wide + gap), tall + 4), text, fill=_MUTED, font=_font(12))
    return page


def _heading(title: str, strips: Sequence[Strip], width: int) -> Image.Image:
    page = Image.new("RGB", (width, 62), _PAPER)
    pen = ImageDraw.Draw(page)
    pen.text((0, 0), fitting(pen, title, 24, width), fill=_INK, font=_font(24))
    keys = [("kept", None), ("merged: mean colour, outlined", "m"), ("dropped", "d")]
    states = [state for strip in strips for state in strip.trail.states]
    if any(state.heat is not None for state in states):
        keys.append(("mixed: the brighter, the larger its share", None))
    x = 0
    for text, kind in keys:
        box = (x, 40, x + 15, 55)
        if kind == "d":
            ghost = tuple(round(GHOST * 150 + (1 - GHOST) * part) for part in DARK)
            pen.rectangle(box, fill=ghost)
            pen.line((x, 47, x + 7, 40), fill="#565b66")
            pen.line((x + 3, 55, x + 15, 43), fill="#565b66")
        elif kind == "m":
            pen.rectangle(box, fill="#9fb3c8", outline="#f4f6f9")
            pen.rectangle((box[0] - 1, box[1] - 1, box[2] + 1, box[3] + 1), outline=_MUTED)
        else:
            for i in range(4):
                left, top = box[0] + 8 * (i % 2), box[1] + 8 * (i // 2)
                shade = ("#b9713f", "#6f8f4e", "#4e7d9f", "#d7c08a")[i]
                pen.rectangle((left, top, left + 7, top + 7), fill=shade)
        pen.text((x + 23, 38), text, fill=_MUTED, font=_font(15))
        x += 23 + round(pen.textlength(text, font=_font(15))) + 26
    return page


def _bands(strip: Strip, panel: int, most: int, attention: bool) -> list[Image.Image]:
    trail, grid = strip.trail, strip.trail.grid
    cell = max(2, round(panel / max(grid)))
    shown = [trail.states[i] for i in chosen_states(trail, most)]
    first = trail.states[0].tokens
    note = f"{trail.name}: {describe(trail.states[-1], first)}"
    note = "; ".join([note, *trail.remarks])
    bands = [
        _band(
            note,
            [(_label(state), draw(strip.picture, grid, state, cell)) for state in shown],
        )
    ]
    seen = [state for state in trail.states if state.attention is not None]
    if attention and seen:
        few = [seen[round(i * (len(seen) - 1) / max(1, most - 1))] for i in range(most)]
        few = list({state.label: state for state in few}.values())
        drawings = [
            (state.label, heat_map(strip.picture, grid, state.attention, cell))
            for state in few
            if state.attention is not None
        ]
        bands.append(_band(f"{trail.name}: what the class token attends to", drawings))
    return bands


def _label(state: State) -> str:
    return state.label if state.kept is not None else f"{state.label}: {state.tokens}"


def _band(note: str, drawings: Sequence[tuple[str, Image.Image]]) -> Image.Image:
    wide, tall = drawings[0][1].size
    width = len(drawings) * (wide + _GAP) - _GAP
    page = Image.new("RGB", (max(width, 640), tall + 54), _PAPER)
    pen = ImageDraw.Draw(page)
    pen.text((0, 0), fitting(pen, note, 16, page.width), fill=_INK, font=_font(16))
    for i, (label, drawing) in enumerate(drawings):
        x = i * (wide + _GAP)
        page.paste(drawing, (x, 26))
        pen.text((x, tall + 32), fitting(pen, label, 14, wide), fill=_MUTED, font=_font(14))
    return page


def fitting(pen: ImageDraw.ImageDraw, text: str, size: int, width: int) -> str:
    """A text in one line, shortened to what fits."""
    text = " ".join(text.split())  # file names may hold line breaks, which Pillow cannot measure
    if pen.textlength(text, font=_font(size)) <= width:
        return text
    while text and pen.textlength(text + "...", font=_font(size)) > width:
        text = text[:-1]
    return text + "..."


def token_plot(trails: Sequence[Trail], width: int = 900, height: int = 300) -> Image.Image:
    """Tokens per block of several models, as a picture.

    Args:
        trails: One for each line.
        width: In pixels.
        height: In pixels.
    """
    lines: dict[tuple[int, ...], list[str]] = {}
    for trail in trails:  # those with the same counts share a line
        lines.setdefault(tuple(trail.counts), []).append(trail.name)
    double = 2  # drawn twice as large, for smooth lines
    page = Image.new("RGB", (width * double, height * double), _PAPER)
    pen = ImageDraw.Draw(page)
    font, small = _font(15 * double), _font(13 * double)
    top = max(max(trail.counts) for trail in trails)
    labels = max(([state.label for state in trail.states] for trail in trails), key=len)
    longest = len(labels)
    names = [" ".join(", ".join(found).split()) for found in lines.values()]
    legend = max(round(pen.textlength(name, font=small)) for name in names) + 46 * double
    legend = min(legend, width * double // 3)
    left, right = 58 * double, width * double - legend - 10 * double
    upper, lower = 32 * double, height * double - 42 * double

    def at(i: int, count: float) -> tuple[float, float]:
        x = left + (right - left) * i / max(1, longest - 1)
        return x, lower - (lower - upper) * count / top

    pen.text((0, 0), "Tokens behind each block", fill=_INK, font=font)
    step = _round_step(top / 4)
    for count in range(0, top + 1, step):
        y = at(0, count)[1]
        pen.line((left, y, right, y), fill=_GRID, width=double)
        text = str(count)
        pen.text((left - 12 * double, y), text, fill=_MUTED, font=small, anchor="rm")
    every = max(1, -(-longest // 14))
    for i in range(0, longest, every):
        text = "in" if i == 0 else labels[i].rpartition(" ")[2]
        pen.text((at(i, 0)[0], lower + 8 * double), text, fill=_MUTED, font=small, anchor="ma")
    for number, (counts, name) in enumerate(zip(lines, names, strict=True)):
        color = COLORS[number % len(COLORS)]
        points = [at(i, count) for i, count in enumerate(counts)]
        pen.line(points, fill=color, width=3 * double, joint="curve")
        for x, y in points:
            r = 3.4 * double
            pen.ellipse((x - r, y - r, x + r, y + r), fill=color, outline=_PAPER)
        y = upper + number * 22 * double
        pen.line((right + 14 * double, y, right + 30 * double, y), fill=color, width=3 * double)
        name = fitting(pen, name, 13 * double, legend - 36 * double)
        pen.text((right + 36 * double, y), name, fill=_INK, font=small, anchor="lm")
    return page.resize((width, height), Image.Resampling.LANCZOS)


def _round_step(step: float) -> int:
    """A step of 1, 2 or 5 times a power of ten, at least that large."""
    power = 1
    while True:
        for factor in (1, 2, 5):
            if factor * power >= step:
                return factor * power
        power *= 10
