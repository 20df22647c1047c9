"""Where a wrapper stands in its own backbone, and how it is left out for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

#: Where a backbone holds what its `forward` has become.
ATTACHED = "zoo_attached"


def is_of(value: Any, made: Any) -> bool:
    """Whether an attribute is an attachment, or a method of it."""
    return value is made or getattr(value, "__self__", None) is made


@contextmanager
def left_out(m: nn.Module) -> Iterator[None]:
    """Meanwhile a model runs by itself, whatever is attached in it."""
    held = [
        (part, name, value)
        for part in m.modules()
        if ATTACHED in vars(part)
        for name, value in vars(part).items()
        if name != ATTACHED and is_of(value, vars(part)[ATTACHED])
    ]
    for part, name, _ in held:
        delattr(part, name)
    try:
        yield
    finally:
        for part, name, value in held:
            setattr(part, name, value)
