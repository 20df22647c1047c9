"""Clusters around density peaks.

Shapes: B batch, N points, K clusters, C width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reduction.functional.matching import bipartite_matching
from reduction.tokens import take_rows

#: Neighbours up to which they are found one by one.
FEW = 8


def _squared(x: Tensor) -> Tensor:
    """Pairwise squared Euclidean distances `(B, N, N)` of `(B, N, C)` by the Gram matrix."""
    # One pass without a squared copy, and one temporary instead of three.
    square = torch.linalg.vector_norm(x, dim=-1).square()
    product = torch.baddbmm(square.unsqueeze(1), x, x.transpose(1, 2), alpha=-2)
    return product.add_(square.unsqueeze(2)).clamp_min_(0)


def _mean_of_nearest(squared: Tensor, k: int) -> Tensor:
    """Mean of the k smallest entries of each row, `(B, N)`."""
    if k > FEW:
        return squared.topk(k, dim=-1, largest=False, sorted=False).values.mean(-1)
    # Taking the smallest a few times is several times faster on a CPU than `topk`.
    rest = squared.clone()
    total = squared.new_zeros(squared.shape[:2])
    for _ in range(k):
        least, place = rest.min(dim=-1, keepdim=True)
        total = total + least.squeeze(-1)
        rest = rest.scatter_(2, place, torch.inf)
    return total / k


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
    density = (-_mean_of_nearest(squared, min(neighbors, n))).exp()
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


@torch.no_grad()
def pairs_and_clusters(
    x: Tensor, order: Tensor, first: int, pairs: int, clusters: int, neighbors: int
) -> tuple[Tensor, Tensor]:
    """Groups of tokens: the most similar pairs among the first ones, clusters of the others.

    Args:
        x: Features `(B, N, C)`.
        order: Indices of the tokens, `(B, N)`.
        first: How many of them may pair up.
        pairs: So many pairs.
        clusters: Of the others.
        neighbors: See `density_peaks`.

    Returns:
        Group of each token `(B, N)` and leader of each group `(B, M)`: pairs first.
    """
    ahead, rest = order[:, :first], order[:, first:]
    peaks, member = density_peaks(take_rows(x, rest), clusters, neighbors)
    slots, leaders = [member + (first - pairs)], [rest.gather(1, peaks)]
    if first:
        match = bipartite_matching(take_rows(x, ahead), pairs, 0)
        place = torch.arange(match.leader.shape[1], device=x.device).expand_as(match.leader)
        own = torch.zeros_like(ahead).scatter(1, match.leader, place)
        slots.insert(0, own.scatter(1, match.source, match.target))
        leaders.insert(0, ahead.gather(1, match.leader))
    slot = torch.zeros_like(order).scatter(1, order, torch.cat(slots, 1))
    return slot, torch.cat(leaders, 1)
