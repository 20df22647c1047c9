"""Batched clustering with fixed shapes: weighted K-Medoids and K-Means without cluster loops.

Every function here works on a batch at once, keeps exactly K clusters, and never leaves one empty,
also when all points are equal. Nothing is differentiable: an assignment is made of indices, and
gradient flows through what is done with it.

Shapes: B batch, N points, K clusters, C width.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from reduction.eager import autocasting, eager_on_cpu, exporting
from reduction.functional.portable import stable_order
from reduction.tokens import take_rows

#: Exponentials of numbers up to this one can be added up by the million in float32.
LARGE = 60.0


class Clusters(NamedTuple):
    """Who belongs where.

    Attributes:
        leader: The point that represents each cluster, ascending, `(B, K)` int64.
        slot: Cluster of each point, `(B, N)` int64. A leader belongs to its own cluster.
    """

    leader: Tensor
    slot: Tensor


def squared_distances(x: Tensor) -> Tensor:
    """Squared Euclidean distances between all points, from one product.

    Computed in float32 or better, whatever the features and autocast say: in bfloat16 the
    neighbours of a token are a matter of rounding. Points are centred first, which changes no
    distance but saves the digits that a common offset would cost.

    Args:
        x: `(B, N, C)`.

    Returns:
        `(B, N, N)`, not negative, zero on the diagonal.
    """
    x = _precise(x)
    x = x - x.mean(1, keepdim=True)
    # One pass without a squared copy, and one temporary instead of four.
    square = torch.linalg.vector_norm(x, dim=-1).square()
    with no_autocast(x):
        distance = torch.baddbmm(square.unsqueeze(1), x, x.transpose(1, 2), alpha=-2)
    distance = distance.add_(square.unsqueeze(2)).clamp_min_(0)
    if exporting():  # no exporter follows a write into a view
        own = torch.eye(x.shape[1], dtype=torch.bool, device=x.device)
        return distance.masked_fill(own, 0.0)
    distance.diagonal(dim1=1, dim2=2).zero_()
    return distance


def heaviest(weight: Tensor, k: int) -> Tensor:
    """The k points of largest weight, ascending; equal ones in the order they come.

    Args:
        weight: `(B, N)`.
        k: How many.

    Returns:
        `(B, K)` int64.
    """
    order = stable_order(weight, descending=True)
    return order[:, :k].sort(dim=1).values


def spread(distance: Tensor, k: int) -> Tensor:
    """k points far apart, found without a loop.

    Points are ranked by their total distance to all others, outermost first, and each is judged by
    its distance to the nearest point of higher rank; the k largest win. So a point is taken when
    nothing that comes before it is near, as in farthest-point seeding, but in one step instead of
    k. A duplicate is judged zero and comes last.

    Args:
        distance: Squared distances `(B, N, N)`.
        k: How many.

    Returns:
        `(B, K)` int64, ascending.
    """
    rank = stable_order(distance.sum(2), descending=True).argsort(dim=1)
    not_higher = rank.unsqueeze(1) >= rank.unsqueeze(2)
    gap = distance.masked_fill(not_higher, torch.inf).amin(2)
    # Among equals (blank images), the higher rank wins.
    order = rank.argsort(dim=1)
    order = order.gather(1, stable_order(gap.gather(1, order), descending=True))
    return order[:, :k].sort(dim=1).values


def farthest_reach(distance: Tensor, start: int, k: int) -> Tensor:
    """k points, each after the first the free one with the largest distance to any point so far.

    Args:
        distance: `(B, N, N)`.
        start: The first point of every image.
        k: How many.

    Returns:
        `(B, K)` int64, no point twice.
    """
    points = [torch.full(distance.shape[:1], start, device=distance.device)]
    reach = distance[:, start]
    taken = torch.zeros_like(reach)
    for _ in range(k - 1):  # each choice depends on the one before
        taken = taken.scatter(1, points[-1].unsqueeze(1), -torch.inf)
        points.append((reach + taken).argmax(1))
        reach = torch.maximum(reach, take_rows(distance, points[-1].unsqueeze(1)).squeeze(1))
    return torch.stack(points, dim=1)


@torch.no_grad()
def kmedoids(
    distance: Tensor, leader: Tensor, weight: Tensor | None = None, iterations: int = 5
) -> Clusters:
    """Weighted K-Medoids by alternation: a local search for `min sum_i w_i min_k d(i, m_k)`.

    Each iteration assigns every point to the nearest medoid and moves each medoid to the member
    with the least weighted distance to its fellow members. The objective never rises.

    Args:
        distance: Squared distances `(B, N, N)`; any dissimilarity with a zero diagonal will do.
        leader: First medoids `(B, K)`, distinct.
        weight: Weights `(B, N)`, positive. None: all equal.
        iterations: At most so many; fewer when nothing changes any more, as far as that can be
            known without waiting for a device or breaking a graph.

    Returns:
        The clusters.
    """
    # cost[b, i, j] is what j costs if i is its medoid.
    cost = distance if weight is None else distance * weight.to(distance.dtype).unsqueeze(1)
    leader = leader.sort(dim=1).values
    may_stop = eager_on_cpu(distance)
    for _ in range(iterations):
        slot = nearest(distance, leader)
        strangers = slot.unsqueeze(2) != slot.unsqueeze(1)
        own = cost.masked_fill(strangers, 0).sum(2)
        new = least_of_cluster(own, slot, leader)
        if may_stop and torch.equal(new, leader):
            break
        leader = new
    leader = leader.sort(dim=1).values
    return Clusters(leader, nearest(distance, leader))


def nearest(distance: Tensor, leader: Tensor) -> Tensor:
    """Nearest medoid of each point; of equal ones the first. A medoid is nearest to itself.

    Args:
        distance: `(B, N, N)`, symmetric.
        leader: `(B, K)`, distinct.

    Returns:
        Clusters `(B, N)` int64 in `[0, K)`.
    """
    return _own(nearest_row(distance, leader), leader)


def nearest_row(distance: Tensor, leader: Tensor) -> Tensor:
    """Nearest of some points for each point; of equal ones the first. Arguments as of `nearest`."""
    # Whole rows of a symmetric matrix: much faster than gathering columns.
    return take_rows(distance, leader).min(dim=1).indices


@torch.no_grad()
def kmeans(
    x: Tensor, leader: Tensor, weight: Tensor | None = None, iterations: int = 5
) -> Clusters:
    """Weighted K-Means (Lloyd): `min sum_i w_i min_k |x_i - c_k|^2` over free centres.

    A cluster that loses all its points takes the most expensive point that no other cluster needs,
    so the objective never rises and no cluster is empty. The centres are the weighted means of the
    result.

    Args:
        x: Points `(B, N, C)`.
        leader: Points that are the first centres, `(B, K)`, distinct.
        weight: Weights `(B, N)`, positive. None: all equal.
        iterations: As for `kmedoids`, but at least one.

    Returns:
        The clusters; a leader is the member nearest to its cluster's centre.
    """
    x = _precise(x)
    x = x - x.mean(1, keepdim=True)
    k = leader.shape[1]
    weight = torch.ones_like(x[..., 0]) if weight is None else weight.to(x.dtype)
    square = x.square().sum(-1)
    centre = take_rows(x, leader.sort(dim=1).values)
    slot = torch.full_like(square, -1, dtype=torch.int64)
    may_stop = eager_on_cpu(x)
    for _ in range(iterations):
        with no_autocast(x):
            product = torch.bmm(centre, x.transpose(1, 2))
        gap, new = (centre.square().sum(-1).unsqueeze(2) - 2 * product).min(dim=1)
        new = _fill_empty(new, (gap + square).clamp_min(0), weight, k)
        if may_stop and torch.equal(new, slot):
            break
        slot = new
        centre = weighted_means(x, slot, weight, k)
    gap = (x - take_rows(centre, slot)).square().sum(-1)
    leader = least_of_cluster(gap, slot, torch.zeros_like(leader))
    # Order clusters by their leaders, so that tokens keep their raster order.
    leader, order = leader.sort(dim=1)
    return Clusters(leader, order.argsort(dim=1).gather(1, slot))


def weighted_means(x: Tensor, slot: Tensor, weight: Tensor, k: int) -> Tensor:
    """Weighted mean of each cluster, `(B, K, C)`.

    Args:
        x: `(B, N, C)`.
        slot: `(B, N)` in `[0, K)`, every cluster with a member.
        weight: `(B, N)`, positive.
        k: K.
    """
    batch, _, width = x.shape
    flat = (slot + torch.arange(batch, device=x.device).unsqueeze(1) * k).reshape(-1)
    share = mean_shares(weight, slot, k).unsqueeze(-1)
    total = x.new_zeros(batch * k, width).index_add(0, flat, (x * share).reshape(-1, width))
    return total.view(batch, k, width)


def mean_shares(weight: Tensor, slot: Tensor, k: int) -> Tensor:
    """Weight of each point as a share of its cluster's, `(B, N)`; the shares of one add up to 1."""
    total = weight.new_zeros(weight.shape[0], k).scatter_add(1, slot, weight)
    return weight / total.gather(1, slot)


def group_exp(score: Tensor, slot: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Exponentials of scores that cannot overflow: where a group's are too large, all are divided.

    Args:
        score: `(B, N)`, in float32 or better.
        slot: Group of each point, `(B, N)`.
        k: K.

    Returns:
        `exp(score - shift of the group)`, `(B, N)`, and the shifts `(B, K)`, which are zero unless
        a score of the group is above `LARGE`.
    """
    top = score.new_zeros(score.shape[0], k).scatter_reduce(1, slot, score.detach(), "amax")
    shift = (top - LARGE).clamp_min(0)
    return (score - shift.gather(1, slot)).exp(), shift


def _fill_empty(slot: Tensor, gap: Tensor, weight: Tensor, k: int) -> Tensor:
    """Give every empty cluster one point, the most expensive ones first.

    Args:
        slot: `(B, N)`.
        gap: Squared distance of each point to its centre, `(B, N)`.
        weight: `(B, N)`.
        k: K, at most N.
    """
    batch, n = slot.shape
    count = slot.new_zeros(batch, k).scatter_add(1, slot, torch.ones_like(slot))
    empty = count == 0
    # The point nearest to the centre stays, or filling one cluster would empty another.
    keeper = least_of_cluster(gap, slot, slot.new_full((batch, k), n))
    kept = slot.new_zeros(batch, n + 1).scatter(1, keeper, 1)[:, :n] > 0
    price = (gap * weight).masked_fill(kept, -torch.inf)
    order = stable_order(price, descending=True)
    place = (empty.long().cumsum(1) - 1).clamp_min(0)
    # Clusters that are not empty write into a column that is cut off.
    taken = torch.where(empty, order.gather(1, place), n)
    into = torch.arange(k, device=slot.device).expand(batch, k)
    return torch.cat([slot, slot[:, :1]], dim=1).scatter(1, taken, into)[:, :n]


def least_of_cluster(value: Tensor, slot: Tensor, otherwise: Tensor) -> Tensor:
    """In each cluster the first point of least value, `(B, K)`.

    Args:
        value: `(B, N)`.
        slot: `(B, N)`.
        otherwise: `(B, K)`, for clusters without a point (or with nothing but NaN).
    """
    n = value.shape[1]
    least = value.new_full(otherwise.shape, torch.inf).scatter_reduce(1, slot, value, "amin")
    place = torch.arange(n, device=slot.device)
    place = torch.where(value == least.gather(1, slot), place, n)
    first = torch.full_like(otherwise, n).scatter_reduce(1, slot, place, "amin")
    return torch.where(first < n, first, otherwise)


def _own(slot: Tensor, leader: Tensor) -> Tensor:
    """Put every leader into its own cluster: a duplicate of another one would lose it."""
    own = torch.arange(leader.shape[1], device=leader.device).expand_as(leader)
    return slot.scatter(1, leader, own)


def _precise(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def no_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Run the products inside in the precision of their operands, whatever autocast says."""
    on = autocasting(x)
    return torch.autocast(x.device.type, enabled=False) if on else nullcontext()
