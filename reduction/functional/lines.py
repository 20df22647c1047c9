"""Merging neighbours within lines, so that a raster stays one.

Shapes: L lines, m places in each, C width, r merges.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from reduction.functional.matching import unit
from reduction.functional.portable import stable_order
from reduction.tokens import take_rows


class Thinned(NamedTuple):
    """What one pass over lines did.

    Attributes:
        x: `(L, m - r, C)`.
        kept: Places that stay, ascending, `(L, m - r)`.
        slot: Where each place went, `(L, m)`.
        source: Places that left, the most similar first, `(L, r)`.
        target: The neighbour that each of them joined, `(L, r)`.
    """

    x: Tensor
    kept: Tensor
    slot: Tensor
    source: Tensor
    target: Tensor


def thin(x: Tensor, r: int, similarity: str = "cosine", last_writer: bool = False) -> Thinned:
    """Let the r places of each line that resemble a neighbour most join it.

    Only odd places leave, so their neighbours are even ones, which stay. Of a group every feature
    keeps the entry of the largest magnitude.

    Args:
        x: `(L, m, C)`.
        r: At most `m // 2`.
        similarity: "cosine", or "distance" (Euclidean).
        last_writer: Where two join the same place, forget the one that official code overwrites.
    """
    if r == 0:
        stay = torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)
        return Thinned(x, stay, stay, stay[:, :0], stay[:, :0])
    odd = x.shape[1] // 2
    with torch.no_grad():
        left, right = _similarities(x.detach(), similarity)
        toward_right = right > left
        order = stable_order(torch.where(toward_right, right, left), descending=True)
        rank = stable_order(order)
        leaves = rank < r
        source = 2 * order[:, :r] + 1
        target = source + 2 * toward_right.gather(1, order[:, :r]).to(source.dtype) - 1
    even = (x.shape[1] + 1) // 2
    own, sender = x[:, ::2], x[:, 1::2]
    # Places left and right of each even one, where there are some.
    before = _shifted(leaves & toward_right, even, 1), _shifted(sender, even, 1)
    after = _shifted(leaves & ~toward_right, even, 0), _shifted(sender, even, 0)
    joins = [before[0], after[0]]
    if last_writer:
        # Written in two rounds, ranks 0, 2, 4.. and then 1, 3, 5..
        turn = rank + (rank % 2) * odd
        first, second = _shifted(turn, even, 1), _shifted(turn, even, 0)
        both = joins[0] & joins[1]
        joins = [joins[0] & ~(both & (first < second)), joins[1] & ~(both & (first > second))]
    merged = own
    for there, other in zip(joins, (before[1], after[1]), strict=True):
        larger = there.unsqueeze(-1) & (other.abs() > merged.abs())
        merged = torch.where(larger, other, merged)
    gone = torch.zeros_like(x[..., 0]).scatter(1, source, 1.0)
    kept = stable_order(gone)[:, : x.shape[1] - r].sort(dim=1).values
    place = (gone == 0).cumsum(1) - 1
    slot = place.scatter(1, source, place.gather(1, target))
    rows = torch.where(kept % 2 == 0, kept // 2, even + kept // 2)
    return Thinned(take_rows(torch.cat([merged, sender], dim=1), rows), kept, slot, source, target)


def _similarities(x: Tensor, similarity: str) -> tuple[Tensor, Tensor]:
    """Of every odd place with its left and its right neighbour, `(L, m // 2)` both."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if similarity == "cosine":
        u = unit(x)
        near = (u[:, 1:] * u[:, :-1]).sum(-1)
    else:
        near = -torch.linalg.vector_norm(x[:, 1:] - x[:, :-1], dim=-1)
    left, right = near[:, ::2], near[:, 1::2]
    if right.shape[1] < left.shape[1]:
        lonely = right.new_full((right.shape[0], 1), -torch.inf)
        right = torch.cat([right, lonely], dim=1)
    return left, right


def _shifted(x: Tensor, even: int, by: int) -> Tensor:
    """Entries of odd places at the even place behind (`by` 1) or before (0) them."""
    if by:
        x = torch.cat([torch.zeros_like(x[:, :1]), x], dim=1)
    missing = even - x.shape[1]
    if missing > 0:
        x = torch.cat([x, torch.zeros_like(x[:, :missing])], dim=1)
    return x[:, :even]
