"""Agglomerative clustering of whole batches.

Shapes: B batch, N points, K clusters.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from reduction.assignment import Merge
from reduction.eager import traced
from reduction.errors import ZooError
from reduction.functional.joining import Decision, Partners
from reduction.functional.matching import unit
from reduction.functional.portable import stable_order
from reduction.functional.thresholds import NOBODY, grouped
from reduction.tokens import Tokens

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
def linked(t: Tokens, distance: Tensor, linkage: str, least: Tensor | None) -> Partners:
    """Clusters in the order in which they join, and how alike they are.

    Args:
        t: Tokens.
        distance: One minus the cosine, `(B, N, N)`.
        linkage: See `agglomerate`.
        least: Stop where no pair is more alike; None: go on to the end.

    Returns:
        One entry for each step; `host` holds both clusters, `(B, S, 2)`.

    Raises:
        ZooError: In a graph, which would have to hold a step for every token of every block.
    """
    if traced():
        raise ZooError(
            "atc with thresholds joins clusters one by one, as many as an image needs, which is no "
            "graph to compile or export; take reducer.thresholds=false, or reducer=dtome"
        )
    live = torch.ones(distance.shape[:2], dtype=torch.bool, device=distance.device)
    live = live if t.mask is None else t.mask[:, t.prefix :]
    both = live.unsqueeze(1) & live.unsqueeze(2)
    pairs = [torch.zeros_like(live[:, :2], dtype=torch.int64)]  # nobody, for where none follow
    best = [torch.full_like(distance[:, :1, 0], NOBODY, dtype=torch.float32)]
    for step in joints(distance.masked_fill(~both, torch.inf), linkage):
        near = (1 - step.near).to(torch.float32)
        if least is not None and bool((near <= least).all()):
            break
        pairs.append(step.pair)
        best.append(torch.where(step.near.isfinite(), near, NOBODY))
    found = torch.stack([*pairs[1:], pairs[0]], 1)
    alike = torch.cat([*best[1:], best[0]], 1)
    return Partners(found[:, :, 1], live, alike, found, 0, t.prefix, live.sum(1) - 1)


@torch.no_grad()
def clusters_of(t: Tokens, d: Decision) -> Merge:
    """Groups after the first of the steps of `linked`, as many as a decision has for each image."""
    place = torch.arange(t.n, device=t.x.device).expand(t.x.shape[0], -1)
    head, count = place, d.merged.sum(1, keepdim=True)
    for i, pair in enumerate(d.pairs.host.unbind(1)):
        moves = (head == pair[:, 1:]) & (i < count)
        head = torch.where(moves, pair[:, :1], head)
    return grouped(head, place.to(torch.float32), d.pairs.live, d.keep)
