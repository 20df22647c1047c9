"""Ranking, nearness and sums that every selector shares: fixed shapes, ties to the lower index.

Shapes: B images, N tokens, C width, K tokens kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reduction.eager import exporting
from reduction.functional.matching import unit


def top(score: Tensor, k: int) -> Tensor:
    """The k largest of each row, `(B, k)`, descending; of equal ones the lower index first."""
    return _order(score)[:, :k]


def first(chosen: Tensor, score: Tensor, k: int) -> Tensor:
    """The k best of each row: those in `chosen` `(B, N)` before all others, each by score."""
    rank = ranks(score)
    # No two keys are equal, so any sort will do.
    return torch.where(chosen, rank, rank + score.shape[1]).argsort(dim=1)[:, :k]


def where(mask: Tensor, k: int) -> Tensor:
    """Indices of k true entries in each row, ascending; every row has that many."""
    place = torch.arange(mask.shape[1], device=mask.device)
    return torch.where(mask, place, place + mask.shape[1]).argsort(dim=1)[:, :k]


def ranks(score: Tensor) -> Tensor:
    """Place of every entry in its row, `(B, N)`: 0 for the largest."""
    if exporting():
        # Counted: no sort that ONNX knows is stable by name.
        place = torch.arange(score.shape[1], device=score.device)
        mine, other = score.unsqueeze(2), score.unsqueeze(1)
        before = (other > mine) | ((other == mine) & (place < place.unsqueeze(1)))
        return before.sum(2)
    order = _order(score)
    place = torch.arange(score.shape[1], device=score.device).expand_as(order)
    return torch.zeros_like(order).scatter(1, order, place)


def _order(score: Tensor) -> Tensor:
    if exporting():
        return ranks(score).argsort(dim=1)
    return score.argsort(dim=1, descending=True, stable=True)


def marked(index: Tensor, n: int) -> Tensor:
    """Mask `(B, N)` of the indices `(B, K)`."""
    mask = torch.zeros(index.shape[0], n, dtype=torch.bool, device=index.device)
    return mask.scatter(1, index, True)


def similarity(x: Tensor) -> Tensor:
    """Cosines between all tokens, `(B, N, N)`; a row of zeros is like nothing."""
    x = unit(x)
    return x @ x.transpose(1, 2)


def nearest(source: Tensor, goal: Tensor) -> Tensor:
    """Index of the goal that each source is most like, by cosine, `(B, R)`; the lowest of equals.

    Args:
        source: `(B, R, C)`.
        goal: `(B, M, C)`, M at least 1.
    """
    return (unit(source) @ unit(goal).transpose(1, 2)).argmax(-1)


def sums(x: Tensor, slot: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Sum of the members of every group, and how many there are.

    A product with a mask: the same on every device, which scattered additions are not.

    Args:
        x: `(B, N, C)`.
        slot: Group of each token, `(B, N)`; -1 for none.
        k: Number of groups.

    Returns:
        `(B, k, C)` and `(B, k, 1)`.
    """
    groups = torch.arange(k, device=slot.device)
    member = (slot.unsqueeze(1) == groups.view(1, k, 1)).to(x.dtype)
    return member @ x, member.sum(2, keepdim=True)


def slots(index: Tensor, n: int) -> Tensor:
    """Output row of every token, `(B, N)`, -1 for those that `index` `(B, K)` does not name."""
    rows = torch.arange(index.shape[1], device=index.device).expand_as(index)
    # What stands for no token writes into a place that is cut off.
    place = torch.where(index < 0, n, index)
    out = torch.full((index.shape[0], n + 1), -1, dtype=torch.int64, device=index.device)
    return out.scatter(1, place, rows)[:, :n]


def farthest(x: Tensor, start: Tensor, k: int) -> Tensor:
    """Farthest point sampling, `(B, k)`, in the order of choice, by squared Euclidean distance.

    Args:
        x: `(B, N, C)`.
        start: First token of each image, `(B,)`.
        k: How many to choose.
    """
    chosen = [start]
    gap = x.new_full(x.shape[:2], torch.inf)
    for _ in range(k - 1):
        last = x.gather(1, chosen[-1].view(-1, 1, 1).expand(-1, 1, x.shape[2]))
        gap = torch.minimum(gap, (x - last).square().sum(-1))
        gap = gap.scatter(1, chosen[-1].unsqueeze(1), -1.0)  # never again, among equals too
        chosen.append(gap.argmax(1))
    return torch.stack(chosen, dim=1)


def spread_from(
    distance: Tensor, chosen: Tensor, k: int, again: bool = False, objective: str = "min"
) -> Tensor:
    """Add the token farthest from the chosen ones until there are k, `(B, k)` in order of choice.

    Args:
        distance: `(B, N, N)`.
        chosen: The first ones, `(B, M)`, M at least 1.
        k: How many at the end.
        again: Whether a chosen token may be chosen again.
        objective: Distance to the chosen ones: "min" or "sum".
    """
    n = distance.shape[2]
    rows = distance.gather(1, chosen.unsqueeze(2).expand(-1, -1, n))
    gap = rows.amin(1) if objective == "min" else rows.sum(1)
    taken = torch.zeros_like(gap)
    if not again:
        taken = taken.scatter(1, chosen, -torch.inf)
    order = [chosen]
    for _ in range(k - chosen.shape[1]):
        best = (gap + taken).argmax(1, keepdim=True)
        row = distance.gather(1, best.unsqueeze(2).expand(-1, -1, n)).squeeze(1)
        gap = torch.minimum(gap, row) if objective == "min" else gap + row
        if not again:
            taken = taken.scatter(1, best, -torch.inf)
        order.append(best)
    return torch.cat(order, dim=1)


def places(score: Tensor, part: Tensor, parts: int) -> Tensor:
    """Place of every token within its part, `(B, N)`: 0 for the largest, ties to the lower index.

    Args:
        score: `(B, N)`.
        part: Of each token, `(N,)` or `(B, N)`.
        parts: How many there are.
    """
    order = top(score, score.shape[1])
    of = part.expand_as(order).gather(1, order)
    groups = torch.arange(parts, device=of.device)
    # In the order of the score: how many of the same part stand before.
    count = (of.unsqueeze(2) == groups).to(torch.int64).cumsum(1)
    place = count.gather(2, of.unsqueeze(2)).squeeze(2) - 1
    return torch.zeros_like(place).scatter(1, order, place)
