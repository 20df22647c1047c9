"""Tokens merge and leave by learned thresholds: decisions, masks and costs as functions.

Shapes as in `reduction.tokens`; S senders and R receivers are the two halves of N tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from reduction.assignment import Assignment, Keep, Merge
from reduction.eager import traced
from reduction.functional.portable import best_of, stable_order
from reduction.tokens import Tokens

#: Keeps rows of the masked softmax finite.
EPSILON = 1e-5
#: Below any cosine: no partner at all.
NOBODY = -2.0


def straight_through(decision: Tensor, value: Tensor, threshold: Tensor, tau: float) -> Tensor:
    """A decision as zeros and ones, with the gradient of a sigmoid.

    Args:
        decision: `(B, N)` bool, as a rule `value > threshold`.
        value: `(B, N)`.
        threshold: Of the block.
        tau: Width of the sigmoid.
    """
    soft = ((value - threshold) / tau).sigmoid()
    return decision.to(soft.dtype) - soft.detach() + soft


def cost_ratio(shares: Sequence[float | Tensor], length: int, width: int) -> float | Tensor:
    """Cost of the blocks relative to the dense model's, by the paper's formula.

    Args:
        shares: Share of the tokens that is left after each block.
        length: N0, tokens at the start, prefix included.
        width: C.
    """
    n, c = float(length), float(width)
    total: float | Tensor = 0.0
    before: float | Tensor = 1.0
    for after in shares:
        total = total + 2 * before * n * c * c + (before * n) * (before * n) * c
        total = total + 4 * after * n * c * c
        before = after
    return total / (len(shares) * (6 * n * c * c + n * n * c))


def masked_map(logits: Tensor, policy: Tensor) -> Tensor:
    """Softmax over the keys that are left, `(B, H, N, N)`, in float32 or better.

    Args:
        logits: `(B, H, N, N)`.
        policy: One for keys that are left and zero for others, `(B, N)`.
    """
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    weight = (z - z.amax(-1, keepdim=True)).exp() * policy[:, None, None, :].to(z.dtype)
    return (weight + EPSILON / z.shape[-1]) / (weight.sum(-1, keepdim=True) + EPSILON)


def joining(best: Tensor, live: Tensor, threshold: Tensor, keep: int | None) -> Tensor:
    """Senders that merge, `(B, S)`.

    Args:
        best: How much each resembles a receiver, `(B, S)`.
        live: Tokens that are none is False, `(B, N)`.
        threshold: Of the block.
        keep: Merge further pairs, the most similar first, until so many are left; None: none.
    """
    above = best > threshold.clamp(0, 1)
    if keep is None or best.shape[1] == 0:
        return above
    wanted = torch.maximum(above.sum(1), live.sum(1) - keep)
    rank = best.argsort(dim=1, descending=True).argsort(dim=1)
    return (rank < wanted.unsqueeze(1)) & (best > NOBODY)


def survivors(score: Tensor, live: Tensor, threshold: Tensor, keep: int | None) -> Tensor:
    """Tokens above the threshold; at least one, and no more than `keep` unless that is None.

    Args:
        score: `(B, N)`.
        live: `(B, N)`; the others do not survive.
        threshold: Of the block.
        keep: The most that may survive, or None.
    """
    n = score.shape[1]
    kept = live & (score > threshold.clamp(0, 1))
    best = score.masked_fill(~live, -torch.inf).argmax(1, keepdim=True)
    lonely = ~kept.any(1, keepdim=True)
    kept = (lonely & marked(best, n)) | (~lonely & kept)  # ONNX chooses between no Booleans
    if keep is not None and keep < n:
        top = score.masked_fill(~kept, -torch.inf).topk(keep, dim=1).indices
        kept = kept & marked(top, n)
    return kept


def packed(
    rows: Tensor,
    kept: Tensor,
    merged: Tensor | None,
    host: Tensor | None,
    longest: int,
    ragged: bool,
) -> Assignment:
    """Write down what stays, in the order of `rows`, with padding behind it.

    Args:
        rows: Tokens, senders first where some merge, `(B, N)`.
        kept: Which of them stay, `(B, N)` bool.
        merged: Which senders merge, `(B, S)` bool, or None.
        host: The receiver that each sender would join, `(B, S)`, or None.
        longest: Rows to keep.
        ragged: Whether some images keep fewer.
    """
    n = rows.shape[1]
    slot = torch.where(kept, kept.cumsum(1) - 1, -1)
    bins = torch.where(kept, slot, n)
    leader = rows.new_zeros(rows.shape[0], n + 1).scatter(1, bins, rows)[:, :longest]
    valid = None
    if ragged:
        count = kept.sum(1, keepdim=True)
        valid = torch.arange(longest, device=rows.device).unsqueeze(0) < count
    if merged is None or host is None:
        return Keep(leader, valid)
    senders = merged.shape[1]
    follows = slot[:, senders:].gather(1, host) if host.shape[1] and senders < n else host
    slot = torch.cat([torch.where(merged, follows, slot[:, :senders]), slot[:, senders:]], 1)
    return Merge(torch.zeros_like(slot).scatter(1, rows, slot), leader, valid=valid)


def lengths(kept: Tensor, limit: int | None) -> tuple[int, bool]:
    """Rows to keep, and whether some are padding. A compiled graph keeps the upper limit.

    Args:
        kept: Which rows stay, `(B, N)` bool.
        limit: The most that may stay, or None for N.
    """
    if kept.device.type == "meta" or traced():
        n = int(kept.shape[1])
        return (n if limit is None else min(n, limit)), True
    low, high = kept.sum(1).aminmax()
    return int(high), bool(low < high)


def grouped(head: Tensor, key: Tensor, live: Tensor, limit: int | None) -> Merge:
    """Groups named by one of their members, in an order of choice.

    Args:
        head: The member that stands for the group of each token, `(B, N)`; its own head is itself.
        key: Groups come in ascending order of this number of their heads, `(B, N)`.
        live: `(B, N)`; the others are in no group.
        limit: The most groups that there may be, or None.
    """
    n = head.shape[1]
    index = torch.arange(n, device=head.device).expand_as(head)
    leads = live & (head == index)
    order = stable_order(key.masked_fill(~leads, torch.inf))
    place = torch.zeros_like(order).scatter(1, order, index)
    slot = torch.where(live, place.gather(1, head), -1)
    longest, ragged = lengths(leads, limit)
    valid = None
    if ragged:
        count = leads.sum(1, keepdim=True)
        valid = torch.arange(longest, device=head.device).unsqueeze(0) < count
    return Merge(slot, order[:, :longest], valid=valid)


def held(source: Tensor) -> Keep:
    """Keep the places that hold others, in their order.

    Args:
        source: The place that stands for each, `(B, N)`; those that stand for others, and for
            themselves, stay.
    """
    index = torch.arange(source.shape[1], device=source.device, dtype=torch.float32)
    live = torch.ones_like(source, dtype=torch.bool)
    a = grouped(source, index.expand(source.shape), live, None)
    return Keep(a.leader, a.valid, a.slot)


def live_first(t: Tokens) -> tuple[Tensor, Tensor]:
    """Rows of reducible tokens with padding last, and which are none, both `(B, N)`."""
    if t.mask is None:
        rows = torch.arange(t.n, device=t.x.device).expand(t.x.shape[0], -1)
        return rows, torch.ones_like(rows, dtype=torch.bool)
    live = t.mask[:, t.prefix :]
    rows = stable_order((~live).to(torch.int8))
    return rows, live.gather(1, rows)


def marked(index: Tensor, n: int) -> Tensor:
    """True at the positions in `index`, `(B, K)` to `(B, n)`."""
    # The tracer knows no Boolean to fill with.
    zero = torch.zeros_like(index[:, :1], dtype=torch.int8).expand(-1, n)
    return zero.scatter(1, index, 1).bool()


def halves(x: Tensor, first: int) -> Tensor:
    """Senders, then receivers: the order behind every merging step."""
    return torch.cat([x[:, first::2], x[:, 1 - first :: 2]], dim=1)


def best_receiver(metric: Tensor, live: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """Highest cosine of each sender with a receiver, and that receiver, `(B, S)` both.

    Args:
        metric: `(B, N, d)` of length one, in the order of the split.
        live: `(B, N)`; the others neither send nor receive.
        first: Index of the first sender.
    """
    senders, receivers = metric[:, first::2], metric[:, 1 - first :: 2]
    if senders.shape[1] == 0 or receivers.shape[1] == 0:
        nobody = metric.new_full(senders.shape[:2], NOBODY)
        return nobody, torch.zeros_like(nobody, dtype=torch.int64)
    cosine = senders @ receivers.transpose(1, 2)
    cosine = cosine.masked_fill(~live[:, 1 - first :: 2].unsqueeze(1), NOBODY)
    best, host = best_of(cosine)
    return best.masked_fill(~live[:, first::2], NOBODY), host


def highest(score: Tensor, joins: Tensor, host: Tensor) -> Tensor:
    """A receiver's score becomes the highest of its group. Senders come first in `score`."""
    senders = joins.shape[1]
    if senders == 0 or senders == score.shape[1]:
        return score
    sent = score[:, :senders] * joins.to(score.dtype)
    received = score[:, senders:].scatter_reduce(1, host, sent, "amax", include_self=True)
    return torch.cat([score[:, :senders], received], dim=1)


def add_copies(t: Tokens, moved: Tensor, host: Tensor) -> Tokens:
    """Add senders to their receivers, weighted by size, and leave them in place."""
    p, senders = t.prefix, moved.shape[1]
    if senders == 0 or senders == t.n:
        return t
    size, x = t.patch_size, t.patches
    dtype = torch.promote_types(x.dtype, torch.float32)
    mass = moved.to(size.dtype) * size[:, :senders]
    total = size[:, senders:].scatter_add(1, host, mass)
    receivers = x[:, senders:].to(dtype) * size[:, senders:, None].to(dtype)
    batch, count, width = receivers.shape
    flat = (host + torch.arange(batch, device=x.device).unsqueeze(1) * count).reshape(-1)
    sent = (x[:, :senders].to(dtype) * mass.unsqueeze(-1).to(dtype)).reshape(-1, width)
    added = receivers.reshape(-1, width).index_add(0, flat, sent).view(batch, count, width)
    added = (added / total.unsqueeze(-1).to(dtype)).to(x.dtype)
    return t._replace(
        x=torch.cat([t.x[:, : p + senders], added], dim=1),
        size=torch.cat([t.size[:, : p + senders], total], dim=1),
        unit=False,
    )
