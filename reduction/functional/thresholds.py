"""Tokens merge and leave by learned thresholds, one or two of them per block.

Shapes as in `reduction.tokens`; S senders and R receivers are the two halves of N tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from reduction.assignment import Assignment, Keep, Merge, apply
from reduction.base import Reducer
from reduction.counts import Dims, Spec, Step
from reduction.eager import traced
from reduction.errors import ZooError
from reduction.functional.attention import attention, column_mean
from reduction.functional.matching import head_sum, split_sizes, unit
from reduction.functional.pooling import masked_average_head
from reduction.functional.portable import stable_order
from reduction.mixins.adaptive import Adaptive
from reduction.mixins.answer import OwnAnswer
from reduction.mixins.attention import AttentionInput, AttentionOutput, OwnAttention
from reduction.mixins.learned import Learned
from reduction.mixins.masking import Masked
from reduction.mixins.training import Outcome, Trains
from reduction.tokens import Signals, Tokens, take_rows

VARIANTS = ("live", "release")
#: Keeps rows of the masked softmax finite.
EPSILON = 1e-5
#: Below any cosine: no partner at all.
_NOBODY = -2.0


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


class ThresholdReducer(Adaptive, Learned, Masked, OwnAttention, OwnAnswer, Trains, Reducer):
    """Base of methods that merge and prune by thresholds. A subclass says what it does.

    Attributes:
        merges: Senders join their most similar receiver if that is similar enough.
        prunes: Tokens that receive too little attention leave.
        first_merge: Initial merging threshold of every block.
    """

    merges: ClassVar[bool] = False
    prunes: ClassVar[bool] = False
    first_merge: ClassVar[float] = 1.0

    site = "mid"
    family = "constant_r"
    every_block = True

    def __init__(
        self,
        tau: float = 0.1,
        budget_weight: float = 10.0,
        target: float | None = None,
        limit: bool = True,
        variant: str = "live",
    ) -> None:
        super().__init__()
        if isinstance(tau, bool) or not tau > 0:
            raise ZooError(f"tau must be positive, got {tau!r}")
        if target is not None and not 0 < target <= 1:
            raise ZooError(f"target must be in (0, 1], got {target!r}")
        if not isinstance(limit, bool):
            raise ZooError(f"limit must be true or false, got {limit!r}")
        if variant not in VARIANTS:
            raise ZooError(f"variant must be one of {VARIANTS}, got {variant!r}")
        self.tau = tau
        self.budget_weight = budget_weight
        self.target = target
        self.limit = limit
        self.variant = variant
        self.merge_threshold: nn.Parameter | None = None
        self.prune_threshold: nn.Parameter | None = None
        self._width, self._goal = 1, 1.0

    # ------------------------------------------------------------------ learned parts

    def setup(self, spec: Spec) -> None:
        """One threshold per block, and the cost that the budget loss aims at."""
        if self.merges:
            self.merge_threshold = _thresholds(self.merge_threshold, spec.depth, self.first_merge)
        if self.prunes:
            self.prune_threshold = _thresholds(self.prune_threshold, spec.depth, 0.0)
        length = spec.prefix + spec.grid[0] * spec.grid[1]
        kept = [length if s is None else s.keep + spec.prefix for s in spec.steps]
        self._width = spec.width
        self._goal = float(cost_ratio([k / length for k in kept], length, spec.width))

    @torch.no_grad()
    def after_step(self) -> None:
        """Keep the thresholds in [0, 1]."""
        for parameter in (self.merge_threshold, self.prune_threshold):
            if parameter is not None:
                parameter.clamp_(0, 1)

    def auxiliary_losses(self, outcome: Outcome) -> dict[str, Tensor]:
        """The squared distance of the cost to its target."""
        first = outcome.trace[0]
        assert first.source is not None
        length = first.source.shape[1] + first.prefix
        shares: list[Tensor] = []
        for t in outcome.trace:
            assert t.policy is not None
            shares.append(t.policy.sum(1).mean() / length)
        ratio = cost_ratio(shares, length, self._width)
        assert isinstance(ratio, Tensor)
        goal = self._goal if self.target is None else self.target
        return {"budget": self.budget_weight * (ratio - goal).square()}

    def macs(self, n: int, prefix: int, step: Step, dims: Dims) -> int:
        """Cosines of senders with receivers; attention received is a signal, counted there."""
        senders, receivers = split_sizes(n, prefix)
        return senders * receivers * dims.head_dim if self.merges else 0

    # ------------------------------------------------------------------ attention

    def begin(self, t: Tokens) -> Tokens:
        """Training begins with all tokens in."""
        return t._replace(policy=torch.ones_like(t.size)) if self.training else t

    def inside(self, t: Tokens) -> bool:
        """Where tokens are masked, and where padding would count in a mean over queries."""
        return t.policy is not None or (t.mask is not None and "column" in self.needs)

    def attend(self, a: AttentionInput, t: Tokens, step: Step | None) -> AttentionOutput | None:
        """Leave padded or masked tokens out, as keys and in the mean over queries."""
        if t.policy is not None:
            return self._masked_attention(a, t.policy)
        if "column" not in a.need:
            return None
        out, _ = attention(
            a.q, a.k, a.v, scale=a.scale, bias=a.bias, dropout=a.dropout, fused=a.fused, drop=a.drop
        )
        return AttentionOutput(
            out, Signals(column=column_mean(a.q, a.k, a.scale, a.bias, live=t.mask))
        )

    def _masked_attention(self, a: AttentionInput, policy: Tensor) -> AttentionOutput:
        logits = (a.q * a.scale) @ a.k.transpose(-2, -1)
        if a.bias is not None:
            logits = logits + a.bias.to(logits.dtype)
        z = logits.to(torch.promote_types(logits.dtype, torch.float32))
        weight = (z - z.amax(-1, keepdim=True)).exp() * policy[:, None, None, :].to(z.dtype)
        map_ = (weight + EPSILON / z.shape[-1]) / (weight.sum(-1, keepdim=True) + EPSILON)
        out = a.dropped(map_.to(a.v.dtype)) @ a.v
        if "column" not in a.need:
            return AttentionOutput(out, Signals())
        if self.variant == "release":
            return AttentionOutput(out, Signals(column=map_.mean((1, 2))))
        live = (policy.detach() > 0.5).to(map_.dtype)
        rows = live / live.sum(1, keepdim=True)
        return AttentionOutput(out, Signals(column=(map_.mean(1) * rows.unsqueeze(2)).sum(1)))

    # ------------------------------------------------------------------ real removal

    def reduce(self, t: Tokens, s: Signals, step: Step) -> Tokens:
        """Remove tokens, or mask them while training."""
        return self._mask(t, s, step) if t.policy is not None else apply(t, self.assign(t, s, step))

    @torch.no_grad()
    def assign(self, t: Tokens, s: Signals, step: Step) -> Assignment:
        """Merge and prune by the thresholds, each image as if it were alone."""
        rows, live = _live_first(t)
        score = None if s.column is None else s.column[:, t.prefix :].gather(1, rows)
        merged = host = None
        if self.merges:
            assert s.k is not None
            metric = unit(take_rows(head_sum(s.k[:, :, t.prefix :]), rows))
            first = t.prefix & 1
            best, host = _best(metric, live, first)
            merged = self._joining(best, live, step, self.limit)
            rows, live = _halves(rows, first), _halves(live, first)
            live = torch.cat([live[:, : merged.shape[1]] & ~merged, live[:, merged.shape[1] :]], 1)
            if score is not None:
                score = _highest(_halves(score, first), merged.to(score.dtype), host)
        kept = live if score is None else self._survivors(score, live, step, self.limit)
        return self._pack(t, rows, kept, merged, host, step)

    def _joining(self, best: Tensor, live: Tensor, step: Step, limit: bool) -> Tensor:
        """Senders that merge, `(B, S)`. `best` is how much each resembles a receiver."""
        assert self.merge_threshold is not None
        above = best > self.merge_threshold[step.block].clamp(0, 1)
        if self.prunes or not limit or best.shape[1] == 0:
            return above
        # Without pruning the limit is kept by merging further pairs, the most similar first.
        wanted = torch.maximum(above.sum(1), live.sum(1) - int(step.keep))
        rank = best.argsort(dim=1, descending=True).argsort(dim=1)
        return (rank < wanted.unsqueeze(1)) & (best > _NOBODY)

    def _survivors(self, score: Tensor, live: Tensor, step: Step, limit: bool) -> Tensor:
        """Tokens above the threshold; at least one, and no more than the limit."""
        assert self.prune_threshold is not None
        n, keep = score.shape[1], int(step.keep)
        kept = live & (score > self.prune_threshold[step.block].clamp(0, 1))
        best = score.masked_fill(~live, -torch.inf).argmax(1, keepdim=True)
        lonely = ~kept.any(1, keepdim=True)
        kept = (lonely & _marked(best, n)) | (~lonely & kept)  # ONNX chooses between no Booleans
        if limit and keep < n:
            top = score.masked_fill(~kept, -torch.inf).topk(keep, dim=1).indices
            kept = kept & _marked(top, n)
        return kept

    def _pack(
        self,
        t: Tokens,
        rows: Tensor,
        kept: Tensor,
        merged: Tensor | None,
        host: Tensor | None,
        step: Step,
    ) -> Assignment:
        """Write down what stays, in the order of `rows`, with padding behind it."""
        n = rows.shape[1]
        slot = torch.where(kept, kept.cumsum(1) - 1, -1)
        longest, ragged = self._lengths(kept, step)
        bins = torch.where(kept, slot, n)
        leader = rows.new_zeros(rows.shape[0], n + 1).scatter(1, bins, rows)[:, :longest]
        valid = None
        if ragged:
            count = kept.sum(1, keepdim=True)
            valid = torch.arange(longest, device=rows.device).unsqueeze(0) < count
        if merged is None or host is None:
            return Keep(leader, valid)
        senders = merged.shape[1]
        follows = slot[:, senders:].gather(1, host) if host.shape[1] else host
        slot = torch.cat([torch.where(merged, follows, slot[:, :senders]), slot[:, senders:]], 1)
        return Merge(torch.zeros_like(slot).scatter(1, rows, slot), leader, valid=valid)

    def _lengths(self, kept: Tensor, step: Step) -> tuple[int, bool]:
        """Rows to keep, and whether some are padding. A compiled graph keeps the upper limit."""
        if kept.device.type == "meta" or traced():
            n = int(kept.shape[1])
            return (min(n, int(step.keep)) if self.limit else n), True
        low, high = kept.sum(1).aminmax()
        return int(high), bool(low < high)

    # ------------------------------------------------------------------ training with masks

    def _mask(self, t: Tokens, s: Signals, step: Step) -> Tokens:
        """Mask what would leave. Masked tokens stay where they are, with what they were."""
        score = None if s.column is None else s.column[:, t.prefix :]
        if self.merges:
            t, score = self._mask_merged(t, s, score, step)
        if score is None:
            return t
        assert self.prune_threshold is not None and t.policy is not None
        policy, threshold = t.policy[:, t.prefix :], self.prune_threshold[step.block]
        live = policy.detach() > 0.5
        with torch.no_grad():
            release = self.variant == "release"
            kept = score > threshold if release else self._survivors(score, live, step, limit=False)
        chosen = straight_through(kept, score, threshold, self.tau).to(policy.dtype)
        if not release:
            # So that a merging threshold learns from those that it has left alone, too.
            chosen = chosen * policy
        policy = torch.where(live, chosen, policy)
        return t._replace(policy=torch.cat([t.policy[:, : t.prefix], policy], dim=1))

    def _mask_merged(
        self, t: Tokens, s: Signals, score: Tensor | None, step: Step
    ) -> tuple[Tokens, Tensor | None]:
        assert s.k is not None and self.merge_threshold is not None and t.policy is not None
        p, first, live_only = t.prefix, t.prefix & 1, self.variant == "live"
        metric = unit(s.k[:, :, p:].mean(1))
        live = t.policy[:, p:].detach() > 0.5
        if live_only:
            # The split of removal: places of masked tokens do not count.
            order = stable_order((~live).to(torch.int8))
            t, metric, live = apply(t, Keep(order)), take_rows(metric, order), live.gather(1, order)
            score = None if score is None else score.gather(1, order)
            best, host = _best(metric, live, first)
        else:
            metric = metric * live.unsqueeze(-1).to(metric.dtype)
            best, host = _best(metric, torch.ones_like(live), first)
        senders = best.shape[1]
        with torch.no_grad():
            decision = self._joining(best, live, step, limit=False)
        threshold = self.merge_threshold[step.block]
        joins = straight_through(decision, best, threshold, self.tau)
        t = apply(t, Keep(_halves(torch.arange(t.n, device=live.device).unsqueeze(0), first)[0]))
        score = None if score is None else _halves(score, first)
        assert t.policy is not None
        sending = _halves(live, first)[:, :senders]
        moved = joins.detach() * sending
        policy = t.policy[:, p : p + senders]
        policy = torch.where(sending, 1 - joins.to(policy.dtype), policy)
        policy = torch.cat([t.policy[:, :p], policy, t.policy[:, p + senders :]], dim=1)
        if score is not None:
            score = _highest(score, moved, host)
        return _add_copies(t._replace(policy=policy), moved, host), score

    def logits(self, backbone: nn.Module, t: Tokens) -> Tensor | None:
        """While training with masks: an average over the tokens that are left."""
        if t.policy is None or getattr(backbone, "global_pool", "token") != "avg":
            return None
        return masked_average_head(backbone, t, t.policy)


def _thresholds(old: nn.Parameter | None, depth: int, value: float) -> nn.Parameter:
    """Thresholds of all blocks, unless those that are there fit."""
    if old is not None and old.shape == (depth,):
        return old
    return nn.Parameter(torch.full((depth,), value))


def _live_first(t: Tokens) -> tuple[Tensor, Tensor]:
    """Rows of reducible tokens with padding last, and which are none, both `(B, N)`."""
    if t.mask is None:
        rows = torch.arange(t.n, device=t.x.device).expand(t.x.shape[0], -1)
        return rows, torch.ones_like(rows, dtype=torch.bool)
    live = t.mask[:, t.prefix :]
    rows = stable_order((~live).to(torch.int8))
    return rows, live.gather(1, rows)


def _marked(index: Tensor, n: int) -> Tensor:
    """True at the positions in `index`, `(B, K)` to `(B, n)`."""
    # The tracer knows no Boolean to fill with.
    zero = torch.zeros_like(index[:, :1], dtype=torch.int8).expand(-1, n)
    return zero.scatter(1, index, 1).bool()


def _halves(x: Tensor, first: int) -> Tensor:
    """Senders, then receivers: the order behind every merging step."""
    return torch.cat([x[:, first::2], x[:, 1 - first :: 2]], dim=1)


def _best(metric: Tensor, live: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """Highest cosine of each sender with a receiver, and that receiver, `(B, S)` both.

    Args:
        metric: `(B, N, d)` of length one, in the order of the split.
        live: `(B, N)`; the others neither send nor receive.
        first: Index of the first sender.
    """
    senders, receivers = metric[:, first::2], metric[:, 1 - first :: 2]
    if senders.shape[1] == 0 or receivers.shape[1] == 0:
        nobody = metric.new_full(senders.shape[:2], _NOBODY)
        return nobody, torch.zeros_like(nobody, dtype=torch.int64)
    cosine = senders @ receivers.transpose(1, 2)
    cosine = cosine.masked_fill(~live[:, 1 - first :: 2].unsqueeze(1), _NOBODY)
    best, host = cosine.max(-1)
    return best.masked_fill(~live[:, first::2], _NOBODY), host


def _highest(score: Tensor, joins: Tensor, host: Tensor) -> Tensor:
    """A receiver's score becomes the highest of its group. Senders come first in `score`."""
    senders = joins.shape[1]
    if senders == 0 or senders == score.shape[1]:
        return score
    sent = score[:, :senders] * joins.to(score.dtype)
    received = score[:, senders:].scatter_reduce(1, host, sent, "amax", include_self=True)
    return torch.cat([score[:, :senders], received], dim=1)


def _add_copies(t: Tokens, moved: Tensor, host: Tensor) -> Tokens:
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
