"""Errors that end a run with one clear line; see `reduction.errors` for their meaning."""

from reduction.errors import (
    BadCheckpoint,
    NoClassToken,
    UnknownName,
    UnreachableBudget,
    UnsupportedModel,
    ZooError,
)

__all__ = [
    "BadCheckpoint",
    "NoClassToken",
    "UnknownName",
    "UnreachableBudget",
    "UnsupportedModel",
    "ZooError",
]
