"""Methods that say how dense features come back from the tokens that are left."""

from __future__ import annotations

from torch import Tensor

from reduction.assignment import unmerge
from reduction.tokens import Tokens, take_rows

_NAME = "restore"


class Restores:
    """A method with a way of its own to give every input patch features again.

    Attributes:
        restore: "copy": the token that holds the patch; anything else is the method's.
    """

    restore: str = "copy"


def note_restore(t: Tokens, out: Tokens, weights: Tensor) -> Tokens:
    """Remember how the tokens before a reduction come back from those behind it.

    Reductions in several blocks are undone one after the other, in one product. Nothing is noted
    where nobody follows the patches.

    Args:
        t: Tokens before, N reducible ones.
        out: Tokens behind, M of them.
        weights: `(B, N, M)`.
    """
    if t.source is None:
        return out
    earlier = t.memory.get(_NAME)
    if earlier is not None:
        # Tokens that a plugin added since lie last, and no patch is in them.
        weights = earlier @ weights[:, : earlier.shape[2]]
    elif t.n != t.source.shape[1]:
        weights = take_rows(weights, t.source.clamp_min(0))
    return out._replace(memory={**out.memory, _NAME: weights})


def restored(t: Tokens) -> Tensor:
    """Every input patch's features, `(B, N0, C)`: as a method noted, or of the token that holds it.

    Args:
        t: Tokens that track `source`.
    """
    weights = t.memory.get(_NAME)
    if weights is None:
        return unmerge(t)
    return (weights @ t.patches[:, : weights.shape[2]].to(weights.dtype)).to(t.x.dtype)
