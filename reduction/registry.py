"""Names of methods: what is written to disk and shown in listings.

Every module in `reduction.methods` is imported on first use, so adding a method means adding a
file and editing no list.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from reduction.base import Card, Reducer, check_needs
from reduction.errors import UnknownName, ZooError

_METHODS: dict[str, type[Reducer]] = {}
_R = TypeVar("_R", bound=type[Reducer])


def register(name: str) -> Callable[[_R], _R]:
    """Class decorator that gives a reducer its registry name.

    Args:
        name: Lower case letters, digits and underscores.

    Raises:
        ValueError: If the name is malformed or taken, or the class has no `card`.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ValueError(f"expected a name like 'token_pooling', got {name!r}")

    def wrap(cls: _R) -> _R:
        other = _METHODS.get(name)
        # The same class may come twice, e.g. when a notebook cell or a module is reloaded.
        if other is not None and other.__qualname__ != cls.__qualname__:
            raise ValueError(f"the name {name!r} already belongs to {other.__qualname__}")
        if not isinstance(getattr(cls, "card", None), Card):
            raise ValueError(f"{cls.__name__} needs a class attribute `card = Card(...)`")
        cls.name = name
        _METHODS[name] = cls
        return cls

    return wrap


def _load() -> dict[str, type[Reducer]]:
    package = importlib.import_module("reduction.methods")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"reduction.methods.{module.name}")
    return _METHODS


def list_methods() -> list[str]:
    """Registry names of all methods, sorted."""
    return sorted(_load())


def method(name: str) -> type[Reducer]:
    """Class of a method.

    Raises:
        UnknownName: With the nearest names.
    """
    methods = _METHODS if name in _METHODS else _load()
    if name not in methods:
        raise UnknownName("reducer", name, [*methods, "none"])
    return methods[name]


def card(name: str) -> Card:
    """Card of a method."""
    return method(name).card


def create(name: str, **args: Any) -> Reducer:
    """Build a reducer.

    Args:
        name: Registry name.
        **args: Constructor arguments of the method.

    Raises:
        UnknownName: If there is no such method.
        ZooError: If an argument is unknown or has a bad value.
    """
    cls = method(name)
    try:
        reducer = cls(**args)
    except TypeError as error:
        raise ZooError(f"reducer {name!r}: {_argument_error(cls, error)}") from error
    check_needs(reducer)
    return reducer


def create_reducer(spec: str | Mapping[str, Any] | Reducer | None) -> Reducer | None:
    """Build a reducer from a name, a mapping `{"name": ..., **args}`, or pass an instance on.

    Raises:
        ZooError: If the specification is none of these.
    """
    if spec is None or (isinstance(spec, str) and spec == "none"):
        return None
    if isinstance(spec, Reducer):
        check_needs(spec)
        return spec
    if isinstance(spec, str):
        return create(spec)
    if isinstance(spec, Mapping) and "name" in spec:
        args = {str(k): v for k, v in spec.items()}
        name = args.pop("name")
        return None if name in (None, "none") else create(name, **args)
    raise ZooError(
        f"expected a reducer name, instance or mapping like {{'name': 'tome'}}, got {spec!r}"
    )


def _argument_error(cls: type, error: TypeError) -> str:
    import inspect

    accepted = list(inspect.signature(cls).parameters)
    text = re.sub(r"^.*__init__\(\) ", "", str(error))
    return f"{text}; it takes {accepted or 'no arguments'}"


def no_reducer() -> None:
    """The dense model; what `reducer=none` builds."""
