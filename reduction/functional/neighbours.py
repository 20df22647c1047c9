"""Tokens that are gone, and the kept ones that they follow.

Shapes: B batch, N tokens, K kept and R other ones, C width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reduction.tokens import take_rows


@torch.no_grad()
def nearest_kept(x: Tensor, chosen: Tensor, rest: Tensor, count: int) -> Tensor:
    """The kept tokens nearest to each other one (Euclidean), `(B, R, k)` places in `chosen`.

    Args:
        x: `(B, N, C)`.
        chosen: Kept tokens `(B, K)`.
        rest: The others `(B, R)`.
        count: How many, at most K.
    """
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    kept, gone = take_rows(exact, chosen), take_rows(exact, rest)
    square = kept.square().sum(-1).unsqueeze(1) + gone.square().sum(-1).unsqueeze(2)
    distance = square - 2 * gone @ kept.transpose(1, 2)
    return distance.topk(min(count, chosen.shape[1]), dim=2, largest=False).indices


def rebuilt(kept: Tensor, start: Tensor, chosen: Tensor, rest: Tensor, near: Tensor) -> Tensor:
    """All tokens in their places, `(B, N, C)`; others have changed as those that they follow.

    Args:
        kept: Kept tokens now, `(B, K, C)`.
        start: All tokens as they were, `(B, N, C)`.
        chosen: Kept tokens `(B, K)`.
        rest: The others `(B, R)`.
        near: Of `nearest_kept`.
    """
    batch, r, k = near.shape
    change = take_rows(kept - take_rows(start, chosen), near.flatten(1))
    others = take_rows(start, rest) + change.view(batch, r, k, -1).mean(2)
    places = torch.cat([chosen, rest], dim=1).argsort(dim=1)
    return take_rows(torch.cat([kept, others], dim=1), places)


def rows_of_heads(x: Tensor, rows: Tensor) -> Tensor:
    """Rows `(B, M)` of queries, keys or values `(B, H, N, d)`."""
    batch, heads, _, width = x.shape
    taken = take_rows(x.transpose(1, 2).flatten(2), rows)
    return taken.view(batch, rows.shape[1], heads, width).transpose(1, 2)
