"""Matching in both directions, and attention maps of fused tokens.

Shapes: B batch, N tokens, H heads.

References:
    MCTF, CVPR 2024, arXiv 2403.10030.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from reduction.functional.portable import best_of, stable_order
from reduction.functional.thresholds import NOBODY


class Groups(NamedTuple):
    """Groups of tokens, in output order.

    Attributes:
        slot: Group of each token, `(B, N)` int64 in `[0, N - r)`.
        leader: The token that a group grows around, `(B, N - r)`.
    """

    slot: Tensor
    leader: Tensor


@torch.no_grad()
def two_way_matching(weight: Tensor, r: int, first: int, both: bool = True) -> Groups:
    """Match the tokens of two alternating sets in both directions.

    First the `r // 2` members of A with the strongest attraction join their partners in B. Then,
    of the same weights, the other `r - r // 2` leave B for partners among what stayed in A. A
    member of B that leaves takes along whoever has joined it.

    Args:
        weight: Attraction `(B, A, B')`.
        r: Tokens that leave; at most half.
        first: Position of A's first token: A holds `first, first + 2, ...`, B the others.
        both: False lets all r leave from A, and B keeps its order.

    Returns:
        Groups: those of A in ascending position, then those of B by descending attraction.
    """
    batch, size_a, size_b = weight.shape
    n, device = size_a + size_b, weight.device
    place_a = torch.arange(first, n, 2, device=device)
    place_b = torch.arange(1 - first, n, 2, device=device)
    from_a = r // 2 if both else r
    best, to_b = best_of(weight)
    order = stable_order(best, descending=True)
    gone_a, stay_a = order[:, :from_a], order[:, from_a:].sort(1).values
    kept = stay_a.shape[1]
    if both:
        rows = weight.gather(1, stay_a.unsqueeze(2).expand(batch, kept, size_b))
        best, to_a = rows.max(1)
        order = stable_order(best, descending=True)
        gone_b, stay_b = order[:, : r - from_a], order[:, r - from_a :]
    else:
        stay_b = torch.arange(size_b, device=device).expand(batch, size_b)
        gone_b = to_a = stay_b[:, :0]
    rank = torch.arange(n - r, device=device).expand(batch, n - r)
    slot_b = to_b.new_zeros(batch, size_b).scatter(1, stay_b, rank[:, kept:])
    slot_b = slot_b.scatter(1, gone_b, to_a.gather(1, gone_b))
    slot_a = to_b.new_zeros(batch, size_a).scatter(1, stay_a, rank[:, :kept])
    slot_a = slot_a.scatter(1, gone_a, slot_b.gather(1, to_b.gather(1, gone_a)))
    back = torch.cat([place_a, place_b]).argsort()
    slot = torch.cat([slot_a, slot_b], 1)[:, back]
    return Groups(slot, torch.cat([place_a[stay_a], place_b[stay_b]], 1))


@torch.no_grad()
def one_way_partners(weight: Tensor, live: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """The strongest attraction of each sender, and to whom, `(B, A)` both.

    Args:
        weight: Attraction `(B, A, B')`.
        live: `(B, N)`; the others attract nobody, nor are attracted: `NOBODY`.
        first: Position of the first sender.
    """
    if not weight.shape[1] or not weight.shape[2]:
        nobody = weight.new_full(weight.shape[:2], NOBODY)
        return nobody, torch.zeros_like(nobody, dtype=torch.int64)
    best, host = best_of(weight.masked_fill(~live[:, 1 - first :: 2].unsqueeze(1), NOBODY))
    return best.masked_fill(~live[:, first::2], NOBODY), host


def fuse_map(map_: Tensor, slot: Tensor, share: Tensor | None, m: int) -> Tensor:
    """The attention map among groups: keys are summed, queries averaged.

    Args:
        map_: `(B, H, N, N)`.
        slot: Group of each row, `(B, N)` in `[0, m)`, prefix included.
        share: Share of each row in its group, `(B, N)`; None takes the largest entry instead.
        m: Number of groups.

    Returns:
        `(B, H, m, m)`; rows add up to what they did.
    """
    batch, heads, n, _ = map_.shape
    flat = (slot + torch.arange(batch, device=slot.device).unsqueeze(1) * m).reshape(-1)

    def summed(rows: Tensor) -> Tensor:
        """Sum `(B, N, ...)` by group."""
        out = rows.new_zeros(batch * m, *rows.shape[2:])
        return out.index_add(0, flat, rows.flatten(0, 1)).view(batch, m, *rows.shape[2:])

    if share is not None:
        rows = map_.transpose(1, 2) * share.to(map_.dtype)[:, :, None, None]
        queries = summed(rows)  # (B, m, H, N)
        return summed(queries.permute(0, 3, 1, 2)).permute(0, 3, 2, 1)
    keys = summed(map_.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)  # (B, H, N, m)
    index = slot[:, None, :, None].expand(batch, heads, n, m)
    return keys.new_zeros(batch, heads, m, m).scatter_reduce(2, index, keys, "amax")
