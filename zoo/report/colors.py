"""One colour per method, the same in the page and in the picture."""

from __future__ import annotations

from collections.abc import Iterable

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
    ("#86600f", "#d9b45f"),
    ("#5f6f00", "#b9cc3a"),
    ("#a1237f", "#f08ad6"),
    ("#3c4fb0", "#9aa9ff"),
    ("#b3331b", "#ff8a73"),
    ("#4a7a8c", "#9ccbdc"),
)

_BLACK, _WHITE = "#000000", "#ffffff"
_ROUNDS = (((_WHITE, _WHITE), 0.0), ((_WHITE, _WHITE), 0.42), ((_BLACK, _BLACK), 0.35))


def _mix(color: str, other: str, share: float) -> str:
    pairs = zip(_channels(color), _channels(other), strict=True)
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in pairs)


def _channels(color: str) -> list[int]:
    return [int(color[start : start + 2], 16) for start in (1, 3, 5)]


def method_colors(methods: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Map every method name to its colour on a light and on a dark ground.

    Names are coloured in alphabetical order. Beyond twelve the colours return, first paler, then
    darker.

    >>> method_colors(["tome", "none"])["none"] == INK
    True
    """
    names = sorted(set(methods) - {DENSE, *KINDS})
    colors = {DENSE: INK, **dict.fromkeys(KINDS, CONTROL)}
    for index, name in enumerate(names):
        light, dark = _PAIRS[index % len(_PAIRS)]
        (for_light, for_dark), share = _ROUNDS[min(index // len(_PAIRS), len(_ROUNDS) - 1)]
        colors[name] = (_mix(light, for_light, share), _mix(dark, for_dark, share))
    return colors
