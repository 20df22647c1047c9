"""What becomes of the tokens that are not kept.

Shapes: B batch, N tokens, M kept and R other ones, C width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reduction.assignment import Fuse, Merge
from reduction.functional.matching import most_similar
from reduction.tokens import Tokens, take_rows


def fuse(kept: Tensor, rest: Tensor, score: Tensor) -> Fuse:
    """One more token, the sum of all others weighted by their scores.

    Args:
        kept: `(B, M)`.
        rest: At least the best of the others, which lends the new token its position, `(B, R)`.
        score: Weights `(B, N)`; gradient flows through them.
    """
    return Fuse(torch.cat([kept, rest[:, :1]], dim=1), score.scatter(1, kept, 0.0))


def join_nearest(t: Tokens, kept: Tensor, rest: Tensor) -> Merge:
    """Each other token joins the kept one that it resembles most, in a size-weighted mean.

    Args:
        t: Tokens; they are compared by cosine.
        kept: `(B, M)`.
        rest: All others `(B, R)`.
    """
    with torch.no_grad():
        # Rows of all tokens: those of the patches alone would be a copy first.
        gone, stay = take_rows(t.x, rest + t.prefix), take_rows(t.x, kept + t.prefix)
        host, _ = most_similar(gone, stay)
    return Merge(None, kept, pairs=(rest, host))
