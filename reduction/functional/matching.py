"""Bipartite soft matching.

Shapes: B batch, n tokens, d metric width, r merges. Indices count reducible tokens from 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from reduction.eager import autocasting, eager_on_cpu
from reduction.functional.portable import best_of


class Matching(NamedTuple):
    """Who merges into whom.

    Attributes:
        leader: Tokens that stay, in output order, `(B, n - r)`.
        source: Tokens that leave, `(B, r)`.
        target: Position in `leader` that each source joins, `(B, r)`.
    """

    leader: Tensor
    source: Tensor
    target: Tensor


def split_sizes(n: int, prefix: int) -> tuple[int, int]:
    """Number of senders and receivers among `n` tokens behind `prefix` protected ones."""
    senders = (n + 1 - (prefix & 1)) // 2
    return senders, n - senders


def head_sum(k: Tensor) -> Tensor:
    """Sum over heads, `(B, H, N, d)` to `(B, N, d)`.

    Cosine similarity does not see the factor between sum and mean. For many images on a CPU,
    adding the strided slices of a fused qkv projection takes two thirds of the time of reducing
    over them, for one image as long; half precision is summed in float32 anyway, and asking for
    that halves the time. All of these give the same bits.
    """
    if k.shape[1] == 1 or not eager_on_cpu(k):
        return k.sum(1)
    if k.dtype != torch.float32:
        return k.sum(1, dtype=torch.promote_types(k.dtype, torch.float32)).to(k.dtype)
    first, *others = k.unbind(1)
    total = first + others[0]
    for head in others[1:]:
        total += head
    return total


def mean_of_members(target: Tensor, m: int) -> Tensor:
    """Weight of each source in the plain mean of its group, leader included.

    Args:
        target: Group that each source joins, `(B, r)`.
        m: Number of groups.

    Returns:
        `(B, r)` float32: one over the number of members.
    """
    members = target.new_ones(target.shape[0], m)
    members = members.scatter_add(1, target, torch.ones_like(target))
    return members.gather(1, target).float().reciprocal()


def unit(x: Tensor) -> Tensor:
    """Rows of length one; a zero row stays zero instead of becoming NaN."""
    length: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / length.clamp_min(1e-12)


@torch.no_grad()
def most_similar(source: Tensor, goal: Tensor) -> tuple[Tensor, Tensor]:
    """Find the goal that each source resembles most, by cosine.

    Args:
        source: `(B, r, d)`.
        goal: `(B, m, d)`, m at least 1.

    Returns:
        Index of the goal `(B, r)` and the cosine `(B, r)` in float32 or better. Rows of zeros
        resemble everything by 0.
    """
    exact = torch.promote_types(source.dtype, torch.float32)
    near, far = _reciprocal_length(source, exact), _reciprocal_length(goal, exact)
    if source.dtype == exact and not autocasting(source):
        # Scaling the products is cheaper than scaling copies of both sides.
        cosine = source @ goal.transpose(1, 2) * far.transpose(1, 2)
        best, index = best_of(cosine)
        return index, best * near.squeeze(-1)
    # Products of features that are not normalised may exceed what float16 can hold.
    left, right = (source * near).to(source.dtype), (goal * far).to(goal.dtype)
    best, index = best_of(left @ right.transpose(1, 2))
    return index, best.to(exact)


def _reciprocal_length(x: Tensor, dtype: torch.dtype) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype)
    return length.clamp_min(1e-12).reciprocal()


def bipartite_matching(metric: Tensor, r: int, prefix: int) -> Matching:
    """Match every other token with its most similar neighbour and merge the r best pairs.

    The official split alternates over the whole sequence, prefix tokens included, so which patches
    send depends on the parity of the prefix. The order of the output rows decides the next split
    and is part of the algorithm: senders that stay, then all receivers.

    Args:
        metric: `(B, n, d)`, compared by cosine.
        r: Merges; at most `n // 2` of them happen.
        prefix: Number of protected tokens in front. Without any, the official code leaves the
            staying senders in descending order of similarity; with some, in ascending position.

    Returns:
        The matching. Several sources may share a target.

    References:
        ToMe, arXiv 2210.09461, section 3.
    """
    n = metric.shape[1]
    r = max(min(r, n // 2), 0)
    metric = unit(metric.detach())
    first = prefix & 1
    senders, receivers = metric[:, first::2], metric[:, 1 - first :: 2]
    if r == 0 or receivers.shape[1] == 0:
        stay = torch.arange(n, device=metric.device).expand(metric.shape[0], -1)
        return Matching(stay, stay[:, :0], stay[:, :0])
    similarity, nearest = best_of(torch.bmm(senders, receivers.transpose(1, 2)))
    order = similarity.argsort(dim=-1, descending=True)
    goal = nearest.gather(1, order[:, :r]) + (order.shape[1] - r)
    tokens = order * 2 + first
    source, stay = tokens[:, :r], tokens[:, r:]
    if prefix:
        stay = stay.sort(dim=-1).values
    odd = torch.arange(1 - first, 2 * receivers.shape[1], 2, device=metric.device)
    leader = torch.cat([stay, odd.expand(metric.shape[0], -1)], dim=1)
    return Matching(leader, source, goal)


@torch.no_grad()
def kth_matching(metric: Tensor, k: int) -> Matching:
    """Merge all tokens but every k-th into the most similar k-th one.

    Tokens behind the last full group of k are neither sources nor leaders: they are dropped, as in
    the official code. No token is protected.

    Args:
        metric: `(B, n, d)`, compared by cosine.
        k: Group length, at least 2.

    Returns:
        The matching with `n // k` leaders.

    Raises:
        ValueError: If `k` is below 2 or above n.

    References:
        ToMe, arXiv 2210.09461, official code (kth bipartite soft matching).
    """
    n = metric.shape[1]
    if not 2 <= k <= n:
        raise ValueError(f"k must be in [2, {n}], got {k}")
    groups = n // k
    index = torch.arange(groups * k, device=metric.device).view(groups, k)
    leader, source = index[:, -1], index[:, :-1].reshape(-1)
    metric = unit(metric)
    target = (metric[:, source] @ metric[:, leader].transpose(1, 2)).argmax(-1)
    batch = metric.shape[0]
    return Matching(leader.expand(batch, -1), source.expand(batch, -1), target)
