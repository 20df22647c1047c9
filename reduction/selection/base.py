"""What a selector is, and what it answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from reduction.base import Card
from reduction.checks import one_of
from reduction.config import Configured
from reduction.errors import ZooError
from reduction.selection.given import Given
from reduction.selection.ranking import slots
from reduction.tokens import take_rows

Compat = Literal["official"]


class Selection(NamedTuple):
    """The tokens that remain.

    Attributes:
        features: `(B, K, C)`, in the type of the input.
        indices: Patch (or group) of every row, `(B, K)` int64, ascending; -1 where a row stands for
            no patch: a class token, a sum of all others, padding. With `compat="official"` the
            rows are in the official order.
        order: Patches in the order in which the method chose or ranked them, `(B, M)`.
        slot: Row that holds each patch, or into which it went, `(B, N)`; -1 where it was dropped.
        valid: How many leading rows are no padding, `(B,)`.
    """

    features: Tensor
    indices: Tensor
    order: Tensor
    slot: Tensor
    valid: Tensor

    def mask(self) -> Tensor:
        """Which patches remained, `(B, N)` bool: true at `indices`."""
        return slots(self.indices, self.slot.shape[1]) >= 0


class Selector(Configured):
    """Base of all selectors: an object without state that chooses K of N tokens.

    A subclass writes `pick`. Constructor arguments are stored under their own names.

    Args:
        compat: "official" answers as the official code does, its defects included; None, with what
            is a defect repaired.

    Attributes:
        card: Provenance of the method.
        reads: Signals of the block whose output is chosen from, of the class token where there is
            one: any of "attention", "k".
        optional: Whether it works without attention, on features alone.
        shallow: Block of a second attention in a tower of 24 blocks, or None.
        from_last: Whether queries and keys of the next block are read ("q" and "k").
        projected: Whether it officially reads what the projector made of the features.
        raster: Whether it reads neighbourhoods, and so needs a grid.
    """

    card: ClassVar[Card]
    reads: Sequence[str] = ()
    optional: ClassVar[bool] = False
    from_last: ClassVar[bool] = False
    projected: ClassVar[bool] = False
    raster: ClassVar[bool] = False

    def __init__(self, compat: Compat | None = None) -> None:
        self.compat = one_of("compat", compat, (None, "official"))

    @property
    def official(self) -> bool:
        """Whether official defects are wanted."""
        return self.compat == "official"

    @property
    def adaptive(self) -> bool:
        """Whether `keep` may be None: the number of tokens then follows from the image."""
        return False

    @property
    def extra_rows(self) -> int:
        """Rows among the K that stand for no patch: a class token, a sum."""
        return 0

    def pick(self, given: Given, keep: int | None) -> Selection:
        """Choose.

        Args:
            given: Inputs.
            keep: Rows to answer with, below N; None where the method decides.
        """
        raise NotImplementedError(f"{type(self).__name__} must override pick")

    def count(self, n: int, share: float) -> int:
        """Tokens that are asked for by a share of `n` to keep."""
        return max(1, int(n * share))

    def rows(self, n: int, keep: int, grid: tuple[int, int] | None = None) -> int:
        """Rows of the answer when `keep` of `n` tokens are asked for."""
        return min(n, keep)

    def shallow_block(self, depth: int) -> int | None:
        """Block whose attention is read beside that of the block chosen from; None for none."""
        return None


def choose(given: Given, index: Tensor, order: Tensor | None = None) -> Selection:
    """Rows at `index` `(B, K)`, as they are, in ascending order.

    Args:
        given: Inputs.
        index: Distinct, in the method's own order.
        order: The method's own order, where it says more.
    """
    index, order = index.sort(dim=1).values, index if order is None else order
    return answer(take_rows(given.features, index), index, order, given.n)


def answer(
    features: Tensor,
    indices: Tensor,
    order: Tensor,
    n: int,
    slot: Tensor | None = None,
    valid: Tensor | None = None,
) -> Selection:
    """A `Selection`; what is left out follows from `indices`."""
    if slot is None:
        slot = slots(indices, n)
    if valid is None:
        valid = torch.full_like(indices[:, 0], indices.shape[1])
    return Selection(features, indices, order, slot, valid)


def everything(given: Given) -> Selection:
    """All rows, where at least as many as there are were asked for."""
    index = torch.arange(given.n, device=given.features.device).expand(given.images, -1)
    return answer(given.features, index, index, given.n)


def whole_number(keep: int | None, who: str) -> int:
    """A number of tokens, for a method that cannot decide by itself.

    Raises:
        ZooError: If there is none.
    """
    if keep is None:
        raise ZooError(f"{who} needs keep, a number of tokens or a share of them, got None")
    return keep
