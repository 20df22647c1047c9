"""Backbones that run themselves: the reduction of tokens is part of their architecture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, cast

from torch import Tensor, nn

from reduction.counts import BlockCost
from zoo.adapters.families import load_families
from zoo.errors import UnsupportedModel


class Macs(NamedTuple):
    """Multiply-accumulates of a standalone backbone for one image.

    Attributes:
        linear: Of everything outside the blocks: patch embedding and heads.
        blocks: Of each block.
    """

    linear: int
    blocks: tuple[BlockCost, ...]


class Standalone(Protocol):
    """What a timm model offers so that the wrapper leaves its forward alone.

    Attributes:
        standalone: Why no reducer applies: a sentence for the person who asked for one.
        method: Short name of what it does to tokens, the `method` of result rows; "none" where it
            is there to be compared with.
    """

    @property
    def standalone(self) -> str:
        """A sentence."""

    @property
    def method(self) -> str:
        """A name."""

    def token_counts(self, grid: tuple[int, int]) -> list[tuple[int, int]]:
        """`(entering, leaving)` of every block for a patch grid."""

    def macs(self, grid: tuple[int, int]) -> Macs:
        """Cost of one image with this patch grid."""

    def budget(self) -> dict[str, Any]:
        """What stands for a schedule in result rows: a mapping with a `name`."""

    def settings(self) -> dict[str, Any]:
        """Constructor arguments that can be changed later, as they are now, in plain values."""

    def training_logits(self, images: Tensor) -> tuple[Tensor, ...]:
        """Logits of every head; in training each gets the same loss."""


#: Modules of other libraries with classes that have a view; their names are compared in every
#: forward pass, also of models that are being traced.
_VIEWED = frozenset({"timm.models.gcvit"})
_VIEWS: dict[type, Callable[[Any], Standalone]] = {}


def register_standalone(cls: type[nn.Module], view: Callable[[Any], Standalone]) -> None:
    """Let a class of another library run itself; the view of a model offers the rest."""
    _VIEWS[cls] = view


def as_standalone(backbone: nn.Module) -> Standalone | None:
    """The backbone, if it runs itself; None for all that the wrapper runs block by block."""
    # Asked of the class: a module takes long to say that it lacks something.
    cls = type(backbone)
    if getattr(cls, "standalone", ""):
        return cast(Standalone, backbone)
    if cls.__module__ not in _VIEWED:
        return None
    if cls not in _VIEWS:
        load_families(cls)
    return _VIEWS[cls](backbone) if cls in _VIEWS else None


def check_alone(backbone: nn.Module, parts: dict[str, bool]) -> None:
    """Refuse what a standalone backbone cannot take.

    Args:
        backbone: Any backbone.
        parts: Whether each part, by name, was asked for.

    Raises:
        UnsupportedModel: With the backbone's own sentence.
    """
    own = as_standalone(backbone)
    asked = [name for name, given in parts.items() if given]
    if own is not None and asked:
        raise UnsupportedModel(f"{' and '.join(asked)} cannot be used here: {own.standalone}")
