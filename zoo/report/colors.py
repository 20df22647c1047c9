"""One colour and one shape per method, the same in the page and in the picture.

A reader tells ten colours apart, not fifty: beyond ten methods the shape changes as well.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from zoo.report.controls import KINDS
from zoo.report.words import DENSE

INK = ("#1c2430", "#e8ecf2")
"""The dense model, on a light and on a dark ground."""

CONTROL = ("#66707d", "#a9b4c2")
"""The controls of the dense model: drawn hollow."""

FRONT = ("#f0b429", "#c98f0a")
"""The Pareto front, drawn as with a highlighter under the points."""

# (on light, on dark). Neighbours differ in hue and in lightness, for readers who see few hues.
_PAIRS = (
    ("#2563d9", "#6ea3ff"),
    ("#d9630b", "#ff9c4a"),
    ("#1f8f4d", "#56d08a"),
    ("#8b3fd6", "#bd93ff"),
    ("#c81e5b", "#ff7ba6"),
    ("#0b8793", "#3fd3dd"),
    ("#7d5222", "#cfa56a"),
    ("#6f8700", "#c3d94a"),
    ("#a1237f", "#f08ad6"),
    ("#a52a14", "#f25c43"),
)

SHAPES = ("circle", "triangle-up", "star", "cross", "triangle-down", "x", "pentagon", "hexagram")
"""plotly's names; squares are the dense model's, and hollow ones the controls'."""

_BLACK, _WHITE = "#000000", "#ffffff"
# How far the colours of each round are mixed, and with what: the same hue, another shape.
_ROUNDS = (
    *((_WHITE, 0.0), (_BLACK, 0.18), (_WHITE, 0.14), (_BLACK, 0.28), (_WHITE, 0.22)),
    *((_BLACK, 0.1), (_WHITE, 0.07), (_BLACK, 0.23)),
)


class Mark(NamedTuple):
    """How a method is drawn.

    Attributes:
        light: Colour on a light ground.
        dark: Colour on a dark ground.
        shape: One of `SHAPES`; "square" for dense models and controls.
    """

    light: str
    dark: str
    shape: str

    @property
    def colors(self) -> tuple[str, str]:
        """Colours on light and on dark."""
        return self.light, self.dark


def _mix(color: str, other: str, share: float) -> str:
    pairs = zip(_channels(color), _channels(other), strict=True)
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in pairs)


def _channels(color: str) -> list[int]:
    return [int(color[start : start + 2], 16) for start in (1, 3, 5)]


def method_marks(methods: Iterable[str]) -> dict[str, Mark]:
    """Map every method name to its colours and its shape; no two of 80 are alike.

    Names are coloured in alphabetical order. After ten the colours return, a little paler or
    darker, with another shape.

    >>> method_marks(["tome", "none"])["none"].shape
    'square'
    """
    names = sorted(set(methods) - {DENSE, *KINDS})
    marks = {DENSE: Mark(*INK, "square"), **dict.fromkeys(KINDS, Mark(*CONTROL, "square"))}
    for index, name in enumerate(names):
        light, dark = _PAIRS[index % len(_PAIRS)]
        turn = index // len(_PAIRS)
        other, share = _ROUNDS[turn % len(_ROUNDS)]
        shape = SHAPES[turn % len(SHAPES)]
        marks[name] = Mark(_mix(light, other, share), _mix(dark, other, share), shape)
    return marks


def method_colors(methods: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Map every method name to its colour on a light and on a dark ground.

    >>> method_colors(["tome", "none"])["none"] == INK
    True
    """
    return {name: mark.colors for name, mark in method_marks(methods).items()}
