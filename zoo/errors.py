"""Errors that end a run with one clear line; see `reduction.errors` for their meaning."""

from reduction.errors import (
    BadCheckpoint,
    UnknownName,
    UnreachableBudget,
    UnsupportedModel,
    ZooError,
)

__all__ = ["BadCheckpoint", "UnknownName", "UnreachableBudget", "UnsupportedModel", "ZooError"]
