"""Clusters around density peaks.

Shapes: B batch, N points, K clusters, C width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reduction.tokens import take_rows


def _squared(x: Tensor) -> Tensor:
    """Pairwise squared Euclidean distances `(B, N, N)` of `(B, N, C)` by the Gram matrix."""
    square = x.square().sum(-1)
    gram = x @ x.transpose(1, 2)
    return (square.unsqueeze(2) + square.unsqueeze(1) - 2 * gram).clamp_min_(0)


@torch.no_grad()
def density_peaks(
    x: Tensor, clusters: int, neighbors: int, noise: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Cluster tokens around peaks of density that are far from denser tokens.

    Args:
        x: `(B, N, C)`.
        clusters: Number of centres K.
        neighbors: k of the density; at most N are used.
        noise: Uniform noise added to the densities.

    Returns:
        Centres `(B, K)` by descending score, and the slot of every token `(B, N)`.
    """
    n, width = x.shape[1:]
    squared = _squared(x.float() if x.dtype != torch.float64 else x) / width
    near = squared.topk(min(neighbors, n), dim=-1, largest=False, sorted=False).values
    density = (-near.mean(-1)).exp()
    if noise:
        density = density + torch.rand_like(density) * noise
    denser = density.unsqueeze(1) > density.unsqueeze(2)
    farthest = squared.flatten(1).amax(1)[:, None, None]
    delta = torch.where(denser, squared, farthest).amin(-1).sqrt()
    centres = (delta * density).topk(clusters, dim=1).indices
    # The matrix is symmetric, so rows of the centres are their columns.
    slot = take_rows(squared, centres).argmin(1)
    own = torch.arange(clusters, device=x.device).expand_as(centres)
    return centres, slot.scatter(1, centres, own)
