"""The interactive page: one self-contained HTML file with a slider over the blocks.

The looks are in ``page.html`` and ``page.css``, the behaviour in ``page.js``; what happened to the
patches goes in as JSON, photographs as JPEG. The file loads nothing from anywhere.
"""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Sequence
from html import escape
from importlib import resources
from typing import Any

import numpy as np
from PIL import Image

from zoo.visual.drawing import Array, cell_means, describe, stretched
from zoo.visual.sheet import COLORS, Strip
from zoo.visual.trail import State, Trail


def html_page(images: Sequence[tuple[str, Sequence[Strip]]], title: str) -> str:
    """The whole page as a string.

    Args:
        images: Names, and what every model made of each.
        title: Headline.
    """
    found = {
        "colors": COLORS,
        "images": [
            {"name": name, "strips": [_strip(strip) for strip in strips]} for name, strips in images
        ],
    }
    text = json.dumps(found, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    # Inside a script element only "<" can end it; as an escape it is the same JSON.
    text = text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    values = {
        "title": escape(title),
        "css": _asset("page.css"),
        "js": _asset("page.js"),
        "payload": text,
    }
    # One pass, so that a value which looks like a placeholder stays as it is.
    page = re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], _asset("page.html"))
    # File names need not be UTF-8; what stands for their bytes is written \udce9, also in JSON.
    return page.encode("utf-8", "backslashreplace").decode("utf-8")


def _asset(name: str) -> str:
    return resources.files("zoo.visual").joinpath(name).read_text(encoding="utf-8")


def _strip(strip: Strip) -> dict[str, Any]:
    trail = strip.trail
    means = np.rint(cell_means(np.asarray(_even(strip)), trail.grid)).astype(np.uint8)
    return {
        "name": trail.name,
        "grid": trail.grid,
        "remarks": trail.remarks,
        "photo": _jpeg(strip.picture),
        "sharp": max(strip.picture.size) < 100,
        "means": _packed(means),
        "states": [_state(state, trail) for state in trail.states],
    }


def _even(strip: Strip) -> Image.Image:
    """The picture with a whole number of pixels for every patch."""
    rows, columns = strip.trail.grid
    wide = max(1, strip.picture.width // columns) * columns
    tall = max(1, strip.picture.height // rows) * rows
    return strip.picture.resize((wide, tall), Image.Resampling.LANCZOS)


def _state(state: State, trail: Trail) -> dict[str, Any]:
    found: dict[str, Any] = {
        "label": state.label,
        "tokens": state.tokens,
        "words": describe(state, trail.states[0].tokens),
        "source": _packed(state.source.astype("<i2")),
    }
    if state.kept is not None:
        found["kept"] = _packed(state.kept.astype(np.uint8))
    if state.heat is not None:
        found["heat"] = _packed(np.rint(255 * state.heat).astype(np.uint8))
    if state.attention is not None:
        share = stretched(state.attention)
        found["attention"] = _packed(np.rint(255 * share).astype(np.uint8))
        found["percent"] = _packed((100 * state.attention).astype("<f4"))
    return found


def _packed(values: Array) -> str:
    return base64.b64encode(np.ascontiguousarray(values).tobytes()).decode()


def _jpeg(picture: Image.Image) -> str:
    file = io.BytesIO()
    kind = "PNG" if max(picture.size) < 100 else "JPEG"
    picture.save(file, format=kind, quality=93)
    return f"data:image/{kind.lower()};base64," + base64.b64encode(file.getvalue()).decode()
