"""Names of methods, schedules and plugins: what is written to disk and shown in listings.

One `Registry` holds one kind of part. The modules of its package are imported on first use, so
adding a method means adding a file and editing no list.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, TypeVar

from reduction.arguments import check_arguments
from reduction.base import Card, Reducer, check_needs
from reduction.errors import UnknownName, ZooError
from reduction.schedules.base import SCHEDULES, Schedule
from reduction.schedules.constant_r import ConstantR

_T = TypeVar("_T")
_R = TypeVar("_R", bound=type[Reducer])
_C = TypeVar("_C", bound=type[Any])


class Registry(Generic[_T]):
    """The classes of one kind of part, by name, and the parser of `name | mapping | instance`.

    Args:
        kind: What a part is called in messages: "reducer", "schedule", "plugin".
        base: Class of all parts.
        package: Package whose modules register parts when they are imported.
        example: A mapping for messages.
        classes: Parts that are known already; the registry keeps this dictionary.
    """

    def __init__(
        self,
        kind: str,
        base: type[_T],
        package: str,
        example: str,
        classes: dict[str, type[_T]] | None = None,
    ) -> None:
        self.kind, self.base, self.package, self.example = kind, base, package, example
        self.classes: dict[str, type[_T]] = {} if classes is None else classes

    def add(self, name: str, cls: type[_T]) -> None:
        """Give a class its name.

        Args:
            name: Lower case letters, digits and underscores.
            cls: The class.

        Raises:
            ValueError: If the name is malformed or taken, or the class has no `card` where others
                of its kind have one.
        """
        check_name(name)
        other = self.classes.get(name)
        # The same class may come twice, e.g. when a notebook cell or a module is reloaded.
        if other is not None and other.__qualname__ != cls.__qualname__:
            raise ValueError(f"the name {name!r} already belongs to {other.__qualname__}")
        if not isinstance(getattr(cls, "card", None), Card):
            raise ValueError(f"{cls.__name__} needs a class attribute `card = Card(...)`")
        cls.name = name  # type: ignore[attr-defined]
        self.classes[name] = cls

    def named(self, name: str) -> Callable[[_C], _C]:
        """Class decorator that gives a class its name.

        Args:
            name: Lower case letters, digits and underscores.

        Raises:
            ValueError: If the name is malformed or taken, or the class has no `card`.
        """
        check_name(name)

        def wrap(cls: _C) -> _C:
            self.add(name, cls)
            return cls

        return wrap

    def load(self) -> dict[str, type[_T]]:
        """All classes by name, after every module of the package was imported."""
        package = importlib.import_module(self.package)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{self.package}.{module.name}")
        return self.classes

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted(self.load())

    def get(self, name: str, also: Sequence[str] = ()) -> type[_T]:
        """Class of a name.

        Args:
            name: Registry name.
            also: Words that mean something where the name was typed, for the message.

        Raises:
            UnknownName: With the nearest names.
        """
        classes = self.classes if name in self.classes else self.load()
        if name not in classes:
            raise UnknownName(self.kind, name, [*classes, *also])
        return classes[name]

    def build(self, name: str, args: Mapping[str, Any], also: Sequence[str] = ()) -> _T:
        """Build a part.

        Raises:
            UnknownName: If there is no such part.
            ZooError: If an argument is unknown or has a bad value.
        """
        cls = self.get(name, also)
        return checked(cls, args, f"{self.kind} {name!r}: ")

    def parse(
        self, spec: str | Mapping[str, Any] | _T, also: Sequence[str] = ()
    ) -> tuple[str, dict[str, Any]] | _T:
        """Read `name | mapping | instance`: an instance, or name and arguments.

        Raises:
            ZooError: If the specification is none of these.
        """
        if isinstance(spec, self.base):
            return spec
        if isinstance(spec, str):
            return spec, {}
        if isinstance(spec, Mapping) and "name" in spec:
            args = {str(k): v for k, v in spec.items()}
            return args.pop("name"), args
        raise ZooError(
            f"expected a {self.kind} name, instance or mapping like {self.example}, got {spec!r}"
        )


def check_name(name: str) -> None:
    """Refuse what is no registry name.

    Raises:
        ValueError: If it is not of lower case letters, digits and underscores.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ValueError(f"expected a name like 'token_pooling', got {name!r}")


def checked(cls: Callable[..., _T], args: Mapping[str, Any], where: str) -> _T:
    """Call a constructor with arguments that somebody typed.

    Args:
        cls: The class, or a function.
        args: Its arguments.
        where: Put before what is said about an argument.

    Raises:
        ZooError: If an argument is unknown, of another type than annotated, or has a bad value.
    """
    try:
        built = cls(**args)
    except ZooError:
        raise  # it knows better than the annotations what it wants
    except Exception as error:
        check_arguments(cls, args, where)
        if not isinstance(error, TypeError):
            raise ZooError(f"{where}{error}") from error
        raise ZooError(f"{where}{argument_error(cls, error)}") from error
    check_arguments(cls, args, where)
    return built


def argument_error(cls: Callable[..., Any], error: TypeError) -> str:
    """What is wrong with the arguments of a constructor, and which it takes."""
    accepted = list(inspect.signature(cls).parameters)
    text = re.sub(r"^.*?\w+\(\) (?=got|missing|takes)", "", str(error))
    return f"{text}; it takes {accepted or 'no arguments'}"


METHODS: Registry[Reducer] = Registry("reducer", Reducer, "reduction.methods", "{'name': 'tome'}")
_SCHEDULES: Registry[Schedule] = Registry(
    "schedule", Schedule, "reduction.schedules", "{'name': 'constant_r', 'r': 13}", SCHEDULES
)


def register(name: str) -> Callable[[_R], _R]:
    """Class decorator that gives a reducer its registry name.

    Args:
        name: Lower case letters, digits and underscores.

    Raises:
        ValueError: If the name is malformed or taken, or the class has no `card`.
    """
    return METHODS.named(name)


def list_methods() -> list[str]:
    """Registry names of all methods, sorted."""
    return METHODS.names()


def method(name: str) -> type[Reducer]:
    """Class of a method.

    Raises:
        UnknownName: With the nearest names.
    """
    return METHODS.get(name, also=["none"])


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
    reducer = METHODS.build(name, args, also=["none"])
    check_needs(reducer)
    return reducer


def create_reducer(spec: str | Mapping[str, Any] | Reducer | None) -> Reducer | None:
    """Build a reducer from a name, a mapping `{"name": ..., **args}`, or pass an instance on.

    Raises:
        ZooError: If the specification is none of these.
    """
    if spec is None:
        return None
    parsed = METHODS.parse(spec)
    if isinstance(parsed, Reducer):
        check_needs(parsed)
        return parsed
    name, args = parsed
    return None if name in (None, "none") else create(name, **args)


def no_reducer() -> None:
    """The dense model; what `reducer=none` builds."""


def create_schedule(spec: str | Mapping[str, Any] | Schedule | None) -> Schedule | None:
    """Build a schedule from a name, a mapping `{"name": ..., **args}`, or pass an instance on.

    Raises:
        UnknownName: With the nearest names.
        ZooError: If an argument is unknown or has a bad value.
    """
    if spec is None:
        return None
    parsed = _SCHEDULES.parse(spec)
    if isinstance(parsed, Schedule):
        return parsed
    name, args = parsed
    if name not in SCHEDULES:
        METHODS.load()  # methods may bring schedules of their own
    return _SCHEDULES.build(name, args)


def list_schedules() -> list[str]:
    """Registry names of all schedules, sorted; methods may bring their own."""
    METHODS.load()
    return _SCHEDULES.names()


def default_schedule(
    r: float | Sequence[int] | None = None, align: int | str = 1
) -> Schedule | None:
    """`schedule.r=13` on a command line without choosing a schedule; None leaves the default.

    Raises:
        ZooError: If counts are to be aligned that nobody gave.
    """
    if r is not None:
        made: Schedule = ConstantR(r, align=align)  # type: ignore[call-arg]
        return made
    if align != 1:
        raise ZooError(f"schedule.align={align} needs a schedule; type e.g. schedule=target_gmacs")
    return None
