"""Types of option values: each a test and the words for it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple


class Kind(NamedTuple):
    """What a value must be.

    Attributes:
        words: As in "expected a whole number from 1".
        fits: Whether a value is one.
        choices: The words that it may be, for "did you mean".
    """

    words: str
    fits: Callable[[Any], bool]
    choices: tuple[str, ...] = ()


def whole(low: int, high: int | None = None) -> Kind:
    """A whole number in a range, ends included; a Boolean is none."""
    top = 2**31 - 1 if high is None else high
    words = f"a whole number from {low}" + ("" if high is None else f" to {high}")
    return Kind(words, lambda v: type(v) is int and low <= v <= top)


def real(
    low: float = -math.inf,
    high: float = math.inf,
    above: float = -math.inf,
    below: float = math.inf,
) -> Kind:
    """A finite number that float32 holds, in a range.

    Args:
        low: The least.
        high: The most.
        above: Must be exceeded.
        below: Must not be reached.
    """
    ends = [
        text.format(f"{end:g}")
        for text, end in (("from {}", low), ("above {}", above), ("to {}", high))
        if math.isfinite(end)
    ]
    ends += [f"below {below:g}"] if math.isfinite(below) else []

    def fits(value: Any) -> bool:
        if type(value) not in (int, float) or not abs(value) <= 3.4e38:
            return False
        return low <= value <= high and above < value < below

    return Kind(" ".join(["a number", *ends]), fits)


def flag() -> Kind:
    """True or false."""
    return Kind("true or false", lambda v: isinstance(v, bool))


def choice(*names: str) -> Kind:
    """One of some words."""
    words = f"one of {', '.join(names)}" if len(names) > 1 else names[0]
    return Kind(words, lambda v: isinstance(v, str) and v in names, names)


def text(words: str = "a text", pattern: str = r"(?s)\s*\S.*") -> Kind:
    """A text that is not empty, or that fits a pattern as a whole."""
    compiled = re.compile(pattern)
    return Kind(
        words,
        lambda v: isinstance(v, str) and "\0" not in v and compiled.fullmatch(v) is not None,
    )


def path(words: str = "a path") -> Kind:
    """A path or a name that is looked up."""
    return text(words)


def null() -> Kind:
    """Nothing."""
    return Kind("null", lambda v: v is None)


def either(*kinds: Kind) -> Kind:
    """One of several kinds."""
    return Kind(
        ", or ".join(kind.words for kind in kinds),
        lambda v: any(kind.fits(v) for kind in kinds),
        tuple(name for kind in kinds for name in kind.choices),
    )


def maybe(kind: Kind) -> Kind:
    """A kind, or null."""
    return either(kind, null())


def list_of(kind: Kind, words: str, least: int = 1, most: int | None = None) -> Kind:
    """A list of one kind.

    Args:
        kind: Of its entries.
        words: For the whole.
        least: Fewest entries.
        most: Most entries.
    """

    def fits(value: Any) -> bool:
        if not isinstance(value, Sequence) or isinstance(value, str | bytes):
            return False
        return least <= len(value) <= (math.inf if most is None else most) and all(
            kind.fits(entry) for entry in value
        )

    return Kind(words, fits, kind.choices)


def interval(kind: Kind, words: str) -> Kind:
    """A list of two numbers of one kind, the lower one first."""
    pair = list_of(kind, words, 2, 2)
    return Kind(words, lambda value: pair.fits(value) and value[0] <= value[1])


def mapping(words: str = "a mapping {NAME: VALUE}", values: Kind | None = None) -> Kind:
    """A mapping with names for keys."""

    def fits(value: Any) -> bool:
        if not isinstance(value, Mapping):
            return False
        return all(
            isinstance(k, str) and (values is None or values.fits(v)) for k, v in value.items()
        )

    return Kind(words, fits)


def built(words: str) -> Kind:
    """A mapping that says with `_target_` what is to be built."""
    return Kind(words, lambda v: isinstance(v, Mapping) and isinstance(v.get("_target_"), str))


def anything() -> Kind:
    """Any value: somebody else knows what it may be."""
    return Kind("anything", lambda value: True)
