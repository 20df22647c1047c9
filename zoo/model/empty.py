"""Batches without images, as an uneven data loader hands them out: they get an empty answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from inspect import signature
from typing import Any, TypeVar

from torch import Tensor

from reduction.eager import traced

_F = TypeVar("_F", bound=Callable[..., Any])


def for_any_batch(method: _F) -> _F:
    """Let a method that takes images answer a batch without any.

    One blank image goes through in their place, and what is returned holds nothing of it. So no
    method has to mind a case in which there is no largest score and nothing to take a mean of.
    """
    first = first_of(method)

    @wraps(method)
    def whole(self: Any, *args: Any, **kwargs: Any) -> Any:
        images, args = taken(first, args, kwargs)
        # A tracer would fix the size of the batch; what are no images is the method's to refuse.
        if traced() or not isinstance(images, Tensor) or images.dim() != 4 or images.shape[0]:
            return method(self, images, *args, **kwargs)
        blank = images.new_zeros((1, *images.shape[1:]))
        return nothing_of(method(self, blank, *args, **kwargs))

    return whole  # type: ignore[return-value]  # wraps keeps the signature, which mypy cannot see


def first_of(method: Callable[..., Any]) -> str:
    """What a method calls its first argument."""
    return list(signature(method).parameters)[1]


def taken(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, tuple[Any, ...]]:
    """The first argument, given by place or by name, and the others that were given by place.

    Args:
        name: What it is called.
        args: All that were given by place.
        kwargs: All that were given by name; it is taken out.

    Raises:
        TypeError: It was not given.
    """
    if args:
        return args[0], args[1:]
    if name not in kwargs:
        raise TypeError(f"missing 1 required argument: {name!r}")
    return kwargs.pop(name), ()


def nothing_of(answer: Any) -> Any:
    """The same, with no image in any of its tensors."""
    if isinstance(answer, Tensor) and not answer.dim():
        return answer
    if isinstance(answer, Tensor):
        rows = answer[:0]
        rows.__dict__.update({name: nothing_of(value) for name, value in vars(answer).items()})
        return rows
    if isinstance(answer, Mapping) and hasattr(answer, "to_tuple"):
        return type(answer)(**{name: nothing_of(value) for name, value in answer.items()})
    if isinstance(answer, Mapping):
        return {name: nothing_of(value) for name, value in answer.items()}
    if isinstance(answer, tuple) and hasattr(answer, "_fields"):
        return type(answer)(*map(nothing_of, answer))
    if isinstance(answer, tuple | list):
        return type(answer)(map(nothing_of, answer))
    return answer
