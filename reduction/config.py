"""Objects that can be written down: a registry name and constructor arguments."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar


class Configured:
    """An object that says how to build it again.

    Constructor arguments must be stored under their own names: `config` reads them back, and with
    that a part of a model can be written to disk.

    Attributes:
        name: Registry name, or empty for a class that has none.
    """

    name: ClassVar[str] = ""

    def config(self) -> dict[str, Any]:
        """Registry name and constructor arguments, in plain values."""
        cls = type(self)
        return {
            "name": self.name or f"{cls.__module__}.{cls.__qualname__}",
            **self.arguments(),
        }

    def arguments(self) -> dict[str, Any]:
        """Constructor arguments in plain values; those that `config` leaves out may be missing."""
        return constructor_arguments(self)

    def extra_repr(self) -> str:
        """Constructor arguments, for printing."""
        return ", ".join(f"{k}={v!r}" for k, v in self.arguments().items())


class Revised:
    """An object that counts its changes, so that what was derived from it can be remembered."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        self.__dict__["_revision"] = self.revision + 1

    @property
    def revision(self) -> int:
        """Grows with every attribute that is set: what was derived before may be out of date."""
        count: int = self.__dict__.get("_revision", 0)
        return count


def constructor_arguments(obj: object) -> dict[str, Any]:
    """Values of an object's constructor arguments, read from attributes of the same names."""
    names = list(inspect.signature(type(obj).__init__).parameters.values())[1:]
    plain = [p for p in names if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return {p.name: _plain(getattr(obj, p.name)) for p in plain}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    return value
