"""Connected components of a raster whose neighbours are joined or not.

Shapes: B batch, P patches of a raster of h x w.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def edges(x: Tensor, grid: tuple[int, int], threshold: float) -> tuple[Tensor, Tensor]:
    """Which patches resemble their right and their lower neighbour by more than a threshold.

    Args:
        x: Unit rows `(B, P, C)`.
        grid: h and w.
        threshold: Cosine, strict.

    Returns:
        `(B, h, w - 1)` and `(B, h - 1, w)`, bool.
    """
    raster = x.reshape(x.shape[0], *grid, x.shape[2])
    right = (raster[:, :, 1:] * raster[:, :, :-1]).sum(-1) > threshold
    below = (raster[:, 1:] * raster[:, :-1]).sum(-1) > threshold
    return right, below


@torch.no_grad()
def components(right: Tensor, below: Tensor) -> Tensor:
    """The smallest patch of every patch's component, `(B, P)`.

    Labels run along edges and up the forest that they form, both in every round, so a fixed number
    of rounds is enough for every pattern and nothing depends on the data.

    Args:
        right: Edges to the right neighbour, `(B, h, w - 1)` bool.
        below: Edges to the lower neighbour, `(B, h - 1, w)` bool.
    """
    batch, rows, columns = right.shape[0], right.shape[1], below.shape[2]
    n = rows * columns
    label = torch.arange(n, device=right.device).expand(batch, -1)
    for _ in range(math.ceil(math.log(max(n, 2), 1.5)) + 2):
        above = label.gather(1, label)
        lowest = _lowest_neighbour(above.view(batch, rows, columns), right, below).flatten(1)
        # The root of a patch hears of it, and so does the patch itself.
        label = label.scatter_reduce(1, label, lowest, "amin", include_self=True)
        label = torch.minimum(torch.minimum(label, lowest), above)
    return label


def _lowest_neighbour(label: Tensor, right: Tensor, below: Tensor) -> Tensor:
    """The smallest label among a patch and those that it is joined with, `(B, h, w)`."""
    best, none = label, label.shape[1] * label.shape[2]
    if label.shape[2] > 1:
        across = torch.where(right, torch.minimum(label[:, :, 1:], label[:, :, :-1]), none)
        best = torch.minimum(best, _padded(across, 2, label))
    if label.shape[1] > 1:
        down = torch.where(below, torch.minimum(label[:, 1:], label[:, :-1]), none)
        best = torch.minimum(best, _padded(down, 1, label))
    return best


def _padded(low: Tensor, dim: int, label: Tensor) -> Tensor:
    """Of every edge its value, at both ends."""
    edge = torch.full_like(label.narrow(dim, 0, 1), label.shape[1] * label.shape[2])
    return torch.minimum(torch.cat([low, edge], dim=dim), torch.cat([edge, low], dim=dim))
