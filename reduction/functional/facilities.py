"""Facility location: few tokens, such that every token is like one of them.

Shapes: B batch, N tokens, K chosen ones, C width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reduction.functional.matching import unit
from reduction.tokens import take_rows


@torch.no_grad()
def facilities(x: Tensor, k: int) -> Tensor:
    """The k tokens that together resemble all tokens most, found greedily, `(B, K)` in that order.

    Args:
        x: `(B, N, C)`, compared by cosine.
        k: How many, at most N.
    """
    u = unit(x.to(torch.promote_types(x.dtype, torch.float32)))
    similarity = u @ u.transpose(1, 2)
    chosen = [similarity.sum(2).argmax(1, keepdim=True)]
    best = take_rows(similarity, chosen[0]).squeeze(1)
    free = torch.zeros_like(best).scatter(1, chosen[0], -torch.inf)
    for _ in range(k - 1):
        # What each token would add; one that is chosen already adds nothing and is left out.
        gain = (similarity - best.unsqueeze(1)).clamp_min(0).sum(2) + free
        chosen.append(gain.argmax(1, keepdim=True))
        free = free.scatter(1, chosen[-1], -torch.inf)
        best = torch.maximum(best, take_rows(similarity, chosen[-1]).squeeze(1))
    return torch.cat(chosen, dim=1)


def shares(x: Tensor, chosen: Tensor, scale: float) -> Tensor:
    """How much of every token each chosen one holds, `(B, K, N)`; columns add up to one.

    Args:
        x: `(B, N, C)`, compared by cosine.
        chosen: `(B, K)`.
        scale: Factor on the cosines before the softmax over the chosen ones.
    """
    u = unit(x.to(torch.promote_types(x.dtype, torch.float32)))
    return (take_rows(u, chosen) @ u.transpose(1, 2) * scale).softmax(1)


def as_means(share: Tensor) -> Tensor:
    """The same as weights of means, rows adding up to one.

    A row of zeros, of a chosen token that none is most like, stays one.
    """
    tiny = torch.finfo(share.dtype).tiny
    return share / share.sum(2, keepdim=True).clamp_min(tiny)
