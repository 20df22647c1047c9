"""Agglomerative clustering of whole batches.

Shapes: B batch, N points, K clusters.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from reduction.functional.matching import unit
from reduction.functional.portable import stable_order
from reduction.functional.thresholds import NOBODY

LINKAGES = ("average", "complete", "single")


class Partition(NamedTuple):
    """Clusters in the order of their first members.

    Attributes:
        slot: Cluster of each point, `(B, N)` int64 in `[0, K)`.
        leader: First member of each cluster, `(B, K)` int64, ascending.
    """

    slot: Tensor
    leader: Tensor


@torch.no_grad()
def cosine_distances(x: Tensor) -> Tensor:
    """One minus the cosine of all pairs, `(B, N, d)` to `(B, N, N)`, in float64 where there is one.

    Which pair is the closest hangs on differences far below what half precision resolves.
    """
    x = unit(x.to(torch.float32 if x.device.type == "mps" else torch.float64))
    return 1 - x @ x.transpose(1, 2)


class Links(NamedTuple):
    """Steps of an agglomeration.

    Attributes:
        pairs: Who joined, `(B, S, 2)`.
        best: How alike they were, `(B, S)`, never rising; `NOBODY` where nobody was left.
    """

    pairs: Tensor
    best: Tensor


class Joint(NamedTuple):
    """One step: the two closest clusters of every image become one.

    Attributes:
        pair: The clusters, named by their first members, `(B, 2)`, ascending.
        near: Their distance, `(B, 1)`; infinite where there is one cluster alone.
    """

    pair: Tensor
    near: Tensor


@torch.no_grad()
def agglomerate(distance: Tensor, k: int, linkage: str = "average") -> Partition:
    """Join the two closest clusters until `k` are left, see `joints`.

    Args:
        distance: `(B, N, N)`, symmetric; the diagonal does not matter.
        k: Clusters to leave, 1 to N.
        linkage: "average" (of all pairs of points), "complete" (the farthest pair) or "single" (the
            nearest).

    Returns:
        The clusters.
    """
    batch, n, _ = distance.shape
    place = torch.arange(n, device=distance.device)
    slot = place.expand(batch, n)
    for step in itertools.islice(joints(distance, linkage), n - k):
        slot = torch.where(slot == step.pair[:, 1:], step.pair[:, :1], slot)
    first = slot == place
    leader = stable_order((~first).to(torch.int8))[:, :k]
    return Partition((first.long().cumsum(1) - 1).gather(1, slot), leader)


@torch.no_grad()
def joints(distance: Tensor, linkage: str = "average") -> Iterator[Joint]:
    """Join the two closest clusters, step by step, until one is left.

    The distances of the new cluster follow from those of the two (Lance and Williams), so each of
    the N - k steps is one search for the smallest entry and one update of a row and a column, for
    all images at once. Of equal distances the first in row-major order is taken.

    Args:
        distance: `(B, N, N)`, symmetric; the diagonal does not matter. Infinite for what is none.
        linkage: See `agglomerate`. Distances of pairs that join never fall.
    """
    batch, n, _ = distance.shape
    place = torch.arange(n, device=distance.device)
    distance = distance.masked_fill(place.unsqueeze(1) == place, torch.inf)
    members = distance.new_ones(batch, n)
    for _ in range(n - 1):
        flat = distance.flatten(1).argmin(1, keepdim=True)
        # A product need not be symmetric to the last bit, so the entry may be below the diagonal.
        pair = torch.cat([flat // n, flat % n], 1).sort(1).values
        yield Joint(pair, distance.flatten(1).gather(1, flat))
        i, j = pair[:, :1], pair[:, 1:]
        rows = pair.unsqueeze(2).expand(batch, 2, n)
        near, far = distance.gather(1, rows).unbind(1)
        if linkage == "single":
            joint = torch.minimum(near, far)
        elif linkage == "complete":
            joint = torch.maximum(near, far)
        else:
            # Clusters that are gone are infinitely far from both, and stay so.
            count = members.gather(1, pair)
            joint = (near * count[:, :1] + far * count[:, 1:]) / count.sum(1, keepdim=True)
        # None joins itself, and j is gone: its row and column are infinite from now on.
        joint = joint.scatter(1, pair, torch.inf)
        new = torch.stack([joint, torch.full_like(joint, torch.inf)], 1)
        distance = distance.scatter_(1, rows, new)
        distance = distance.scatter_(2, rows.transpose(1, 2), new.transpose(1, 2))
        members = members.scatter_add(1, i, members.gather(1, j))


@torch.no_grad()
def linked(distance: Tensor, live: Tensor, linkage: str, least: float | None) -> Links:
    """All pairs that join one after another, and how alike they are.

    Args:
        distance: One minus the cosine, `(B, N, N)`.
        live: `(B, N)`; the others join nobody.
        linkage: See `agglomerate`.
        least: Stop where no pair is more alike; None: go on to the end.
    """
    both = live.unsqueeze(1) & live.unsqueeze(2)
    pairs, best = [], []
    for step in joints(distance.masked_fill(~both, torch.inf), linkage):
        alike = (1 - step.near).to(torch.float32)
        if least is not None and bool((alike <= least).all()):
            break
        pairs.append(step.pair)
        best.append(torch.where(step.near.isfinite(), alike, NOBODY))
    batch, n = live.shape
    if not pairs:
        nobody = torch.full((batch, 1), NOBODY, device=live.device)
        return Links(torch.zeros(batch, 1, 2, dtype=torch.int64, device=live.device), nobody)
    return Links(torch.stack(pairs, 1), torch.cat(best, 1))


@torch.no_grad()
def clusters_after(pairs: Tensor, count: Tensor, n: int) -> Tensor:
    """The first member of the cluster of each point after so many steps, `(B, N)`.

    Args:
        pairs: See `Links`.
        count: Steps in each image, `(B,)`.
        n: Points.
    """
    slot = torch.arange(n, device=pairs.device).expand(len(pairs), n)
    for i, pair in enumerate(pairs.unbind(1)):
        moves = (slot == pair[:, 1:]) & (i < count.unsqueeze(1))
        slot = torch.where(moves, pair[:, :1], slot)
    return slot
