"""What becomes of the tokens that are not kept.

Shapes: B batch, N tokens, M kept and R other ones, C width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reduction.assignment import Fuse, Merge
from reduction.functional.joining import Decision
from reduction.functional.matching import Matching, most_similar
from reduction.functional.portable import stable_order
from reduction.functional.thresholds import live_first
from reduction.tokens import Tokens, take_rows


def fuse(kept: Tensor, rest: Tensor, score: Tensor) -> Fuse:
    """One more token, the sum of all others weighted by their scores.

    Args:
        kept: `(B, M)`.
        rest: At least the best of the others, which lends the new token its position, `(B, R)`.
        score: Weights `(B, N)`; gradient flows through them.
    """
    return Fuse(torch.cat([kept, rest[:, :1]], dim=1), score.scatter(1, kept, 0.0))


def join_nearest(t: Tokens, kept: Tensor, rest: Tensor) -> Merge:
    """Each other token joins the kept one that it resembles most, in a size-weighted mean.

    Args:
        t: Tokens; they are compared by cosine.
        kept: `(B, M)`.
        rest: All others `(B, R)`.
    """
    with torch.no_grad():
        # Rows of all tokens: those of the patches alone would be a copy first.
        gone, stay = take_rows(t.x, rest + t.prefix), take_rows(t.x, kept + t.prefix)
        host, _ = most_similar(gone, stay)
    return Merge(None, kept, pairs=(rest, host))


def hand_on(t: Tokens, kept: Tensor) -> Merge:
    """The tokens that are not kept join the kept ones that they resemble most.

    Args:
        t: Tokens with N reducible tokens.
        kept: `(B, M)`, or `(M,)` where all images keep the same.
    """
    kept = kept.expand(t.x.shape[0], -1)
    stays = torch.zeros(t.x.shape[0], t.n, device=t.x.device).scatter(1, kept, 1.0)
    rest = stable_order(stays)[:, : t.n - kept.shape[1]]
    return join_nearest(t, kept, rest)


def join_closest(x: Tensor, order: Tensor, keep: int) -> Merge:
    """Of the less important half, the tokens closest to one of the other half join it.

    Args:
        x: What is compared by cosine, of the tokens in `order`, `(B, M, d)`.
        order: Tokens by falling importance, `(B, M)`; all others are dropped.
        keep: Tokens that are left, at least half of M.
    """
    left = order.shape[1]
    upper = left - left // 2
    with torch.no_grad():
        target, similarity = most_similar(x[:, upper:], x[:, :upper])
        rank = similarity.argsort(dim=1, descending=True)
    lower = order[:, upper:]
    gone, stay = rank[:, : left - keep], rank[:, left - keep :]
    return Merge(
        None,
        torch.cat([order[:, :upper], lower.gather(1, stay)], 1),
        pairs=(lower.gather(1, gone), target.gather(1, gone)),
    )


def prune_or_pool(score: Tensor, threshold: float, match: Matching, plain: bool = False) -> Merge:
    """Images with uneven scores drop what comes last; those with flat ones pool matched pairs.

    Args:
        score: `(B, N)`.
        threshold: Variance from which scores are uneven.
        match: Pairs, of which so many are left as shall be left.
        plain: Plain means in place of size-weighted ones.
    """
    keep = match.leader.shape[1]
    pool = (score.var(1, keepdim=True) < threshold).expand_as(score)
    order = stable_order(score, descending=True)
    rows = torch.arange(keep, device=order.device).expand(order.shape[0], -1)
    kept = torch.full_like(order, -1).scatter(1, order[:, :keep], rows)
    pooled = torch.zeros_like(order).scatter(1, match.leader, rows)
    pooled = pooled.scatter(1, match.source, match.target)
    leader = torch.where(pool[:, :keep], match.leader, order[:, :keep])
    a = Merge(torch.where(pool, pooled, kept), leader)
    return plain_mean(a, score.dtype) if plain else a


def plain_shares(slot: Tensor, k: int, dtype: torch.dtype) -> Tensor:
    """One over the members of its group for each token, `(B, N)`; slot -1 is in none."""
    held = slot.clamp_min(0)
    members = slot.new_zeros(slot.shape[0], k).scatter_add(1, held, (slot >= 0).long())
    return members.gather(1, held).to(dtype).reciprocal()


def plain_mean(a: Merge, dtype: torch.dtype) -> Merge:
    """Groups as they are, each the plain mean of its members."""
    assert a.slot is not None
    return a._replace(coef=plain_shares(a.slot, a.leader.shape[1], dtype))


def weighed(t: Tokens, a: Merge, weight: Tensor) -> Merge:
    """Groups as they are, in which a token counts by weight and size; weight zero is in none.

    Args:
        t: Tokens.
        a: Groups, by slots.
        weight: Not negative, `(B, N)`.
    """
    assert a.slot is not None
    mass = weight * t.patch_size
    slot = torch.where(weight > 0, a.slot, -1)
    held = slot.clamp_min(0)
    counted = torch.where(slot >= 0, mass, 0.0)
    total = mass.new_zeros(a.leader.shape).scatter_add(1, held, counted)
    return a._replace(slot=slot, coef=mass / total.gather(1, held), mass=mass)


def prune_uneven(
    t: Tokens, score: Tensor, threshold: float, d: Decision, plain: bool = False
) -> Merge:
    """Images with uneven scores drop what comes last instead, as many as would leave by merging.

    Args:
        t: Tokens.
        score: Shares, which add up to one over an image, `(B, N)`.
        threshold: Variance from which an image is uneven.
        d: Who merges.
        plain: Plain means in place of size-weighted ones.
    """
    a, (rows, live) = d.joined(t), live_first(t)
    assert a.slot is not None
    score, n = score.gather(1, rows), live.sum(1, keepdim=True)
    variance = ((score - 1 / n).square() * live).sum(1, keepdim=True) / (n - 1)
    prune = (variance >= threshold) & d.merged.any(1, keepdim=True)
    order = stable_order(score.masked_fill(~live, -torch.inf), descending=True)
    order = rows.gather(1, order)
    k, left = a.leader.shape[1], a.slot.amax(1, keepdim=True) + 1
    place = torch.arange(t.n, device=order.device).expand_as(order)
    kept = torch.zeros_like(order).scatter(1, order, torch.where(place < left, place, -1))
    leader = torch.where(prune, order[:, :k], a.leader)
    a = a._replace(slot=torch.where(prune, kept, a.slot), leader=leader)
    return plain_mean(a, score.dtype) if plain else a
