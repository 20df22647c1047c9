"""Errors with a one-line message written for the person at the keyboard.

They live here, below everything else, because both layers raise them; `zoo.errors` re-exports
them. All derive from ValueError, so code that knows nothing of this library can catch them.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping


class ZooError(ValueError):
    """Base of every error that a user can fix by typing something else."""


class UnknownName(ZooError):
    """A reducer, schedule, plugin or backbone name that nothing is registered under."""

    def __init__(self, kind: str, name: object, known: Iterable[str]) -> None:
        known = sorted(known)
        near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"known: {known}"
        if not near and len(known) > 40:
            hint = f"{len(known)} names are known, such as {', '.join(known[:: len(known) // 5])}"
            if command := {"reducer": "zoo list", "backbone": "zoo list --models"}.get(kind):
                hint = f"{len(known)} names are known; list them with `{command}`"
        super().__init__(f"unknown {kind} {str(name)!r}; {hint}")


class UnreachableBudget(ZooError):
    """A schedule asks for more (or less) than the method can remove from this model."""


class UnsupportedModel(ZooError):
    """A backbone, block or attention class without an adapter."""


class NoClassToken(ZooError):
    """A method reads a class token that the model does not have.

    Args:
        message: What to type instead.
        instead: The arguments of the method that do without one; empty where none do.
    """

    def __init__(self, message: str, instead: Mapping[str, str]) -> None:
        super().__init__(message)
        self.instead = dict(instead)

    def __reduce__(self) -> tuple[type[NoClassToken], tuple[str, dict[str, str]]]:
        """Errors travel between processes; the default would forget what to type instead."""
        return NoClassToken, (str(self), self.instead)


class BadCheckpoint(ZooError):
    """A file that cannot be loaded: truncated, unsafe, or of another architecture."""
