"""Arguments of a constructor against its own annotations, before anything is built.

A word where a number belongs, `true` for a count, infinity or a list of the wrong things would
otherwise fail somewhere inside, or be taken for something else. Ranges are the constructor's.
"""

from __future__ import annotations

import collections.abc
import functools
import inspect
import math
import numbers
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Union

from reduction.errors import ZooError

# What float32 and 64-bit integers hold; beyond that torch fails or answers with infinity.
_LARGEST = 3.4e38
_MOST = 2**63


def check_arguments(build: Callable[..., Any], args: Mapping[str, Any], where: str = "") -> None:
    """Refuses values that are not of the annotated types.

    Arguments without an annotation, or with one of other classes than plain data, are not looked
    at, and names that do not exist are left to the call.

    Args:
        build: A class or a function.
        args: Arguments by name.
        where: Put before the name of an argument in messages, e.g. "reducer.".

    Raises:
        ZooError: For the first one that does not fit.
    """
    hints = argument_hints(build)
    for name, value in args.items():
        if name in hints and not fits(value, hints[name]):
            raise ZooError(f"{where}{name} must be {words(hints[name])}, got {value!r}")


@functools.cache
def argument_hints(build: Callable[..., Any]) -> Mapping[str, Any]:
    """Annotations of a constructor's or function's arguments, by name.

    Those that a `**options` hands on to the base class are among them.
    """
    if not inspect.isclass(build):
        return _hints(build)
    found: dict[str, Any] = {}
    for cls in build.__mro__:
        own = vars(cls).get("__init__")
        if own is None:
            continue
        found = {**_hints(own), **found}
        kinds = [p.kind for p in inspect.signature(own).parameters.values()]
        if inspect.Parameter.VAR_KEYWORD not in kinds:
            break
    return {**found, **getattr(build, "common_hints", {})}


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    try:
        hints = typing.get_type_hints(function)
        parameters = inspect.signature(function).parameters.values()
    except (NameError, TypeError, ValueError):
        return {}  # names that only a type checker imports, or a function written in C
    single = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {p.name: hints[p.name] for p in parameters if p.kind in single and p.name in hints}


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of an annotated type; true for annotations that are no plain data."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return any(fits(value, one) for one in inner)
    if origin is Literal:
        return value in inner and type(value) in map(type, inner)
    if origin in (list, tuple, collections.abc.Sequence):
        return _is_list(value) and all(fits(one, inner[0]) for one in value)
    if origin in (dict, collections.abc.Mapping):
        return isinstance(value, Mapping) and all(fits(one, inner[1]) for one in value.values())
    if hint is bool:
        return isinstance(value, bool)
    if hint is int:
        return is_whole(value)
    if hint is float:
        return is_number(value)
    if hint is str:
        return isinstance(value, str)
    if hint in (None, type(None)):
        return value is None
    return True


def is_whole(value: Any) -> bool:
    """Whether a value is an integer that 64 bits hold; a Boolean is none."""
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    return whole and -_MOST <= int(value) < _MOST


def is_number(value: Any) -> bool:
    """Whether a value is a finite number that float32 holds; a Boolean is none."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return False
    if isinstance(value, numbers.Integral):
        return is_whole(value)
    return math.isfinite(value) and abs(float(value)) <= _LARGEST


def words(hint: Any, many: bool = False) -> str:
    """An annotation in words: "a whole number or null"."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return (" and " if many else ", or ").join(words(one, many) for one in inner)
    if origin is Literal:
        return "one of " + ", ".join(map(str, inner))
    if origin in (list, tuple, collections.abc.Sequence):
        return f"{'lists' if many else 'a list'} of {words(inner[0], many=True)}"
    if origin in (dict, collections.abc.Mapping):
        return f"{'mappings' if many else 'a mapping'} of {words(inner[1], many=True)}"
    one, several = _WORDS.get(hint, (getattr(hint, "__name__", str(hint)),) * 2)
    return str(several if many else one)


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


_WORDS: dict[Any, tuple[str, str]] = {
    bool: ("true or false", "true or false"),
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    str: ("a text", "texts"),
    type(None): ("null", "null"),
    Any: ("anything", "values"),
}
