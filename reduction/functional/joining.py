"""Bipartite merging in which similarity decides how many pairs merge, in every image by itself.

Shapes as in `reduction.tokens`; S senders and R receivers are the two halves of N tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from reduction.assignment import Merge
from reduction.functional.matching import unit
from reduction.functional.portable import stable_order
from reduction.functional.thresholds import (
    NOBODY,
    best_receiver,
    halves,
    lengths,
    live_first,
    packed,
)
from reduction.tokens import Tokens, take_rows


class Partners(NamedTuple):
    """Who would merge into whom.

    Attributes:
        rows: Tokens with padding last, `(B, N)`.
        live: Which of them are tokens, `(B, N)`.
        best: How much each sender resembles a receiver, `(B, S)`; `NOBODY` for padding.
        host: That receiver, `(B, S)`.
        first: Index in `rows` of the first sender.
        prefix: P.
        cap: Pairs of an image that can merge at most, `(B,)`; None is half of the sequence.
    """

    rows: Tensor
    live: Tensor
    best: Tensor
    host: Tensor
    first: int
    prefix: int
    cap: Tensor | None = None

    @property
    def senders(self) -> Tensor:
        """The tokens that would merge, `(B, S)`."""
        return self.rows[:, self.first :: 2]


@torch.no_grad()
def partners(t: Tokens, metric: Tensor, score: Tensor | None = None) -> Partners:
    """Find them. The split alternates over the whole sequence, prefix included, padding not.

    Args:
        t: Tokens.
        metric: Compared by cosine, `(B, N, d)`.
        score: The split alternates over tokens in falling order of this, `(B, N)`, and knows no
            prefix.
    """
    rows, live = live_first(t)
    first = t.prefix & 1
    if score is not None:
        fallen = take_rows(score, rows).masked_fill(~live, -torch.inf)
        order = stable_order(fallen, descending=True)
        rows, live, first = rows.gather(1, order), live.gather(1, order), 0
    best, host = best_receiver(unit(take_rows(metric, rows)), live, first)
    return Partners(rows, live, best, host, first, t.prefix)


@torch.no_grad()
def ranked_partners(t: Tokens, metric: Tensor, score: Tensor) -> Partners:
    """Find them, where the less important half may merge into the more important one.

    Args:
        t: Tokens.
        metric: Compared by cosine, `(B, N, d)`.
        score: Higher for what matters more, `(B, N)`.
    """
    rows, live = live_first(t)
    fallen = take_rows(score, rows).masked_fill(~live, -torch.inf)
    rows = rows.gather(1, stable_order(fallen, descending=True))
    # The two halves alternate from here on: padding stays last, however many there are.
    count = live.sum(1, keepdim=True)
    place = torch.arange(t.n, device=rows.device)
    rank = place // 2 + (place & 1) * ((count + 1) // 2)
    rows = rows.gather(1, torch.where(live, rank, place))
    best, host = best_receiver(unit(take_rows(metric, rows)), live, 1)
    return Partners(rows, live, best, host, 1, t.prefix, count.squeeze(1) // 2)


class Decision(NamedTuple):
    """Who merges.

    Attributes:
        pairs: Who would.
        merged: Which senders do, `(B, S)` bool.
        keep: The most tokens that may be left, or None.
    """

    pairs: Partners
    merged: Tensor
    keep: int | None

    def joined(self, t: Tokens) -> Merge:
        """Groups, each a size-weighted mean, see `joined`."""
        return joined(t, self.pairs, self.merged, self.keep)

    def of_tokens(self, values: Tensor, others: Tensor) -> Tensor:
        """Values of senders that merge `(B, S)` among those of all others, `(B, N)`."""
        senders = self.pairs.senders
        own = others.gather(1, senders)
        return others.scatter(1, senders, torch.where(self.merged, values.to(others.dtype), own))


def ranks(best: Tensor) -> Tensor:
    """Rank of each entry in its row, the largest first; equal ones in their order."""
    return stable_order(stable_order(best, descending=True))


def above(p: Partners, threshold: Tensor, keep: int | None, most: Tensor | None = None) -> Tensor:
    """Senders that merge, `(B, S)` bool: those above a threshold.

    Args:
        p: Who would merge.
        threshold: Of the block.
        keep: Merge further pairs, the most similar first, until so many tokens are left; None:
            none.
        most: Never merge more pairs in an image.
    """
    wanted = ((p.best > threshold) & (p.best > NOBODY)).sum(1)
    if most is not None:
        wanted = torch.minimum(wanted, most)
    count = p.live.sum(1)
    # Of a sequence with prefix tokens as many as can merge do; the cap is of one without.
    wanted = torch.minimum(wanted, (count + p.prefix - 1) // 2 if p.cap is None else p.cap)
    if keep is not None:
        wanted = torch.maximum(wanted, count - keep)
    return (ranks(p.best) < wanted.unsqueeze(1)) & (p.best > NOBODY)


def best_of_batch(p: Partners, r: int, most: int | None = None) -> tuple[Tensor, Tensor]:
    """The `B r` most similar pairs of a whole batch, and the threshold that they follow from.

    Args:
        p: Who would merge.
        r: Pairs per image on average.
        most: Never merge more pairs in an image.

    Returns:
        Senders that merge `(B, S)` bool, and the similarity of the best pair that does not, at
        least zero.
    """
    batch, senders = p.best.shape
    flat = p.best.reshape(-1)
    order = stable_order(flat, dim=0, descending=True)
    rank = stable_order(order, dim=0).view(batch, senders)
    merged = (rank < batch * r) & (p.best > NOBODY)
    for limit in (most, None if p.cap is None else p.cap.unsqueeze(1)):
        if limit is not None:
            merged = merged & (ranks(p.best) < limit)
    last = flat[order[min(batch * r, flat.shape[0] - 1)]] if flat.shape[0] else flat.new_zeros(())
    return merged, last.clamp_min(0)


def joined(
    t: Tokens,
    p: Partners,
    merged: Tensor,
    limit: int | None,
    untouched: bool = True,
    by_similarity: bool = False,
    eps: float = 0.0,
) -> Merge:
    """Write down who merges: senders that stay come first, then all receivers.

    Args:
        t: Tokens.
        p: Who would merge.
        merged: Which senders do, `(B, S)`.
        limit: The most tokens that may be left, or None.
        untouched: Leave the order as it is in images where nobody merges.
        by_similarity: Senders that stay come in falling similarity, instead of in their order.
        eps: Added to sizes that means divide by.
    """
    senders = merged.shape[1]
    rows, live = halves(p.rows, p.first), halves(p.live, p.first)
    host = p.host
    if by_similarity:
        order = stable_order(p.best, descending=True)
        rows = torch.cat([rows[:, :senders].gather(1, order), rows[:, senders:]], 1)
        live = torch.cat([live[:, :senders].gather(1, order), live[:, senders:]], 1)
        merged, host = merged.gather(1, order), host.gather(1, order)
    kept = torch.cat([live[:, :senders] & ~merged, live[:, senders:]], 1)
    longest, ragged = lengths(kept, limit)
    a = packed(rows, kept, merged, host, longest, ragged)
    assert isinstance(a, Merge) and a.slot is not None
    if untouched:
        none = ~merged.any(1, keepdim=True)
        index = torch.arange(p.rows.shape[1], device=p.rows.device)
        place = torch.where(p.live, index, -1)
        slot = torch.where(none, torch.zeros_like(p.rows).scatter(1, p.rows, place), a.slot)
        a = a._replace(slot=slot, leader=torch.where(none, p.rows[:, :longest], a.leader))
    if not eps:
        return a
    assert a.slot is not None
    size, held = t.patch_size, a.slot.clamp_min(0)
    counted = torch.where(a.slot >= 0, size, 0.0)
    total = size.new_zeros(a.leader.shape).scatter_add(1, held, counted)
    return a._replace(coef=counted / (total.gather(1, held) + eps))
