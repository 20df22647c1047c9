"""Checks of arguments: one line each where they are stored, and the same sentence everywhere.

Every function takes the name of an argument and its value, and returns the value. A Boolean is no
number here, nor is what is infinite or not a number.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from typing import Any, TypeGuard, TypeVar

from reduction.errors import ZooError

T = TypeVar("T")


def one_of(name: str, value: T, known: Iterable[object]) -> T:
    """A word, or a number, out of a few.

    Raises:
        ZooError: If it is another one.
    """
    known = tuple(known)
    if isinstance(value, bool) or value not in known:
        raise ZooError(f"{name} must be one of {known}, got {value!r}")
    return value


def boolean(name: str, value: T) -> T:
    """True or false.

    Raises:
        ZooError: If it is neither.
    """
    if not isinstance(value, bool):
        raise ZooError(f"{name} must be true or false, got {value!r}")
    return value


def number(name: str, value: T, least: float | None = None, null: bool = False) -> T:
    """A finite number, of at least `least` where that is given.

    Raises:
        ZooError: If it is none, or too small.
    """
    what = "a finite number" if least is None else f"{least:g} or more"
    low = -math.inf if least is None else least
    return _within(name, value, what, null, finite(value) and value >= low)  # type: ignore[operator]


def positive(name: str, value: T, null: bool = False) -> T:
    """A finite number above zero.

    Raises:
        ZooError: If it is none.
    """
    return _within(name, value, "positive", null, finite(value) and value > 0)  # type: ignore[operator]


def share(
    name: str, value: T, zero: bool = True, one: bool = True, most: float = 1, null: bool = False
) -> T:
    """A number between zero and one, or zero and `most`; whether the ends count is said.

    Raises:
        ZooError: If it is none.
    """
    what = f"in {'[' if zero else '('}0, {most:g}{']' if one else ')'}"
    fits = finite(value) and 0 <= value <= most  # type: ignore[operator]
    fits = fits and (zero or value != 0) and (one or value != most)
    return _within(name, value, what, null, fits)


def shares(
    name: str, value: float | Sequence[float], zero: bool = False, one: bool = True
) -> float | list[float]:
    """One share for all, or a list of them, see `share`.

    Raises:
        ZooError: If it is neither, or an entry is no such share.
    """
    if isinstance(value, str) or not isinstance(value, Sequence):
        return share(name, value, zero, one)
    values = [share(name, v, zero, one) for v in value]
    if not values:
        raise ZooError(f"{name} must hold at least one number, got {value!r}")
    return values


def count(name: str, value: T, least: int = 1, null: bool = False, what: str = "") -> T:
    """A whole number of at least `least`; `what` says it in other words.

    Raises:
        ZooError: If it is none.
    """
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    return _within(name, value, what or f"{least} or more", null, whole and value >= least)  # type: ignore[operator]


def listed(name: str, value: Sequence[T], what: str = "a list") -> list[T]:
    """What a list or tuple holds.

    Raises:
        ZooError: If it is neither.
    """
    if not is_list(value):
        raise ZooError(f"{name} must be {what}, got {value!r}")
    return list(value)


def is_list(value: object) -> TypeGuard[Sequence[Any]]:
    """Whether it is a list, a tuple or the like, and not a word."""
    return isinstance(value, Sequence) and not isinstance(value, str)


def finite(value: object) -> bool:
    """Whether it is a number that can be reckoned with."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _within(name: str, value: T, what: str, null: bool, fits: bool) -> T:
    if fits or (null and value is None):
        return value
    raise ZooError(f"{name} must be {what}{', or null' if null else ''}, got {value!r}")


def typed(value: object) -> str:
    """A value as it is typed on a command line: `null`, `true`, `nearest`, `0.5`."""
    return "null" if value is None else str(value).lower()
