"""LTMP: learned thresholds say which tokens merge, and which leave."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from reduction.assignment import Assignment, Keep, apply
from reduction.base import Card, Reducer
from reduction.checks import boolean, number, one_of, positive, share
from reduction.counts import Dims, Spec, Step
from reduction.functional import thresholds
from reduction.functional.matching import head_sum, split_sizes, unit
from reduction.functional.pooling import masked_average_head
from reduction.functional.portable import stable_order
from reduction.functional.received import attention_and_column, column_mean, shares_map
from reduction.mixins.adaptive import Adaptive
from reduction.mixins.answer import OwnAnswer
from reduction.mixins.attention import AttentionInput, AttentionOutput, OwnAttention
from reduction.mixins.learned import Learned
from reduction.mixins.masking import Masked
from reduction.mixins.training import Outcome, Trains
from reduction.registry import register
from reduction.tokens import Signals, Tokens, take_rows

VARIANTS = ("live", "release")


class ThresholdReducer(Adaptive, Learned, Masked, OwnAttention, OwnAnswer, Trains, Reducer):
    """Base of methods that merge and prune by thresholds. A subclass says what it does.

    Arguments are described at `LTMP`.

    Attributes:
        merges: Senders join their most similar receiver if that is similar enough.
        prunes: Tokens that receive too little attention leave.
        first_merge: Initial merging threshold of every block.
    """

    card = Card(
        title="Learned Thresholds Token Merging and Pruning for Vision Transformers",
        authors="Bonnaerens and Dambre",
        venue="TMLR",
        year=2023,
        arxiv="2307.10780",
        code="https://github.com/Mxbonn/ltmp",
        licence="none",
        kind="merge + prune",
        training="thresholds alone, backbone frozen",
        note="Counts depend on the image; the schedule limits them, unless limit=false.",
    )
    merges: ClassVar[bool] = False
    prunes: ClassVar[bool] = False
    first_merge: ClassVar[float] = 1.0

    site = "mid"
    no_thresholds = "its thresholds are learned; train it"
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
        self.tau = positive("tau", tau)
        self.budget_weight = number("budget_weight", budget_weight, 0)
        self.target = share("target", target, zero=False, null=True)
        self.limit = boolean("limit", limit)
        self.variant = one_of("variant", variant, VARIANTS)
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
        self._goal = float(thresholds.cost_ratio([k / length for k in kept], length, spec.width))

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
        ratio = thresholds.cost_ratio(shares, length, self._width)
        assert isinstance(ratio, Tensor)
        goal = self._goal if self.target is None else self.target
        return {"budget": self.budget_weight * (ratio - goal).square()}

    def macs(self, n: int, prefix: int, step: Step, dims: Dims) -> int:
        """Cosines of senders with receivers; attention received is a signal, counted there."""
        senders, receivers = split_sizes(n, prefix)
        return senders * receivers * dims.head_dim if self.merges else 0

    # ------------------------------------------------------------------ attention

    def inside(self, t: Tokens) -> bool:
        """Where tokens are masked, and where padding would count in a mean over queries."""
        return t.policy is not None or (t.mask is not None and "column" in self.needs)

    def attend(self, a: AttentionInput, t: Tokens, step: Step | None) -> AttentionOutput | None:
        """Leave padded or masked tokens out, as keys and in the mean over queries."""
        if t.policy is not None:
            return self._masked_attention(a, t.policy)
        if "column" not in a.need:
            return None
        if a.free and not a.dropout and a.fused and shares_map(a.q, a.k, a.v, a.bias):
            out, column = attention_and_column(a.q, a.k, a.v, a.scale, a.bias, t.mask)
        else:
            out, _ = a._replace(need=frozenset()).usual()
            column = column_mean(a.q, a.k, a.scale, a.bias, t.mask)
        return AttentionOutput(out, Signals(column=column))

    def _masked_attention(self, a: AttentionInput, policy: Tensor) -> AttentionOutput:
        map_ = thresholds.masked_map(a.logits(), policy)
        out = a.dropped(map_.to(a.v.dtype)) @ a.v
        if "column" not in a.need:
            return AttentionOutput(out, Signals())
        if self.variant == "release":
            return AttentionOutput(out, Signals(column=map_.mean((1, 2))))
        live = (policy.detach() > 0.5).to(map_.dtype)
        rows = live / live.sum(1, keepdim=True)
        return AttentionOutput(out, Signals(column=(map_.mean(1) * rows.unsqueeze(2)).sum(1)))

    # ------------------------------------------------------------------ real removal

    @torch.no_grad()
    def assign(self, t: Tokens, s: Signals, step: Step) -> Assignment:
        """Merge and prune by the thresholds, each image as if it were alone."""
        rows, live = thresholds.live_first(t)
        score = None if s.column is None else s.column[:, t.prefix :].gather(1, rows)
        merged = host = None
        if self.merges:
            metric = unit(take_rows(head_sum(s.need("k")[:, :, t.prefix :]), rows))
            first = t.prefix & 1
            best, host = thresholds.best_receiver(metric, live, first)
            merged = self._joining(best, live, step, self.limit and not self.prunes)
            rows, live = thresholds.halves(rows, first), thresholds.halves(live, first)
            live = torch.cat([live[:, : merged.shape[1]] & ~merged, live[:, merged.shape[1] :]], 1)
            if score is not None:
                score = thresholds.highest(
                    thresholds.halves(score, first), merged.to(score.dtype), host
                )
        kept = live if score is None else self._survivors(score, live, step, self.limit)
        limit = step.keep if self.limit else None
        return thresholds.packed(rows, kept, merged, host, *thresholds.lengths(kept, limit))

    def _joining(self, best: Tensor, live: Tensor, step: Step, limit: bool) -> Tensor:
        assert self.merge_threshold is not None
        keep = step.keep if limit else None
        return thresholds.joining(best, live, self.merge_threshold[step.block], keep)

    def _survivors(self, score: Tensor, live: Tensor, step: Step, limit: bool) -> Tensor:
        assert self.prune_threshold is not None
        keep = step.keep if limit else None
        return thresholds.survivors(score, live, self.prune_threshold[step.block], keep)

    # ------------------------------------------------------------------ training with masks

    def mask(self, t: Tokens, s: Signals, step: Step) -> Tokens:
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
        chosen = thresholds.straight_through(kept, score, threshold, self.tau).to(policy.dtype)
        if not release:
            # So that a merging threshold learns from those that it has left alone, too.
            chosen = chosen * policy
        policy = torch.where(live, chosen, policy)
        return t._replace(policy=torch.cat([t.policy[:, : t.prefix], policy], dim=1))

    def _mask_merged(
        self, t: Tokens, s: Signals, score: Tensor | None, step: Step
    ) -> tuple[Tokens, Tensor | None]:
        assert self.merge_threshold is not None and t.policy is not None
        p, first, live_only = t.prefix, t.prefix & 1, self.variant == "live"
        metric = unit(s.need("k")[:, :, p:].mean(1))
        live = t.policy[:, p:].detach() > 0.5
        if live_only:
            # The split of removal: places of masked tokens do not count.
            order = stable_order((~live).to(torch.int8))
            t, metric, live = apply(t, Keep(order)), take_rows(metric, order), live.gather(1, order)
            score = None if score is None else score.gather(1, order)
            best, host = thresholds.best_receiver(metric, live, first)
        else:
            metric = metric * live.unsqueeze(-1).to(metric.dtype)
            best, host = thresholds.best_receiver(metric, torch.ones_like(live), first)
        senders = best.shape[1]
        with torch.no_grad():
            decision = self._joining(best, live, step, limit=False)
        threshold = self.merge_threshold[step.block]
        joins = thresholds.straight_through(decision, best, threshold, self.tau)
        t = apply(
            t, Keep(thresholds.halves(torch.arange(t.n, device=live.device).unsqueeze(0), first)[0])
        )
        score = None if score is None else thresholds.halves(score, first)
        assert t.policy is not None
        sending = thresholds.halves(live, first)[:, :senders]
        moved = joins.detach() * sending
        policy = t.policy[:, p : p + senders]
        policy = torch.where(sending, 1 - joins.to(policy.dtype), policy)
        policy = torch.cat([t.policy[:, :p], policy, t.policy[:, p + senders :]], dim=1)
        if score is not None:
            score = thresholds.highest(score, moved, host)
        return thresholds.add_copies(t._replace(policy=policy), moved, host), score

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


@register("ltmp")
class LTMP(ThresholdReducer):
    """Merge tokens that are alike enough, then prune those that receive too little attention.

    Between attention and MLP of every block: tokens alternate between senders and receivers, and a
    sender whose keys resemble a receiver's by more than the block's merging threshold joins it, in
    a size-weighted mean that is as important as its most important member. Then every token that
    receives no more attention (mean over heads and queries) than the pruning threshold is dropped.
    Two numbers per block are all that is learned.

    In training nothing is removed: masks with the gradient of a sigmoid take part in attention, and
    a loss pulls the cost to its target.

    Args:
        tau: Width of the sigmoids that stand for the thresholds in the backward pass.
        budget_weight: Factor of the budget loss.
        target: Cost relative to the dense model that the budget loss aims at, by the paper's
            formula; None is that of the schedule's counts.
        limit: Let no image keep more tokens in a block than the schedule says: the least important
            leave, or where nothing is pruned the most similar further pairs merge. Without it the
            thresholds alone decide, as in the paper, and counts of the schedule are expectations.
            Training does not know the limit.
        variant: How the training form treats tokens that are masked. "live": as removal does, so
            that both forms agree. "release": as the official code does; there masked tokens vote on
            importance and hold their place in the split.

    Raises:
        ZooError: If an argument is out of range.

    References:
        Bonnaerens and Dambre, TMLR 2023, arXiv 2307.10780; official code github.com/Mxbonn/ltmp
        (no licence file; this implementation is written from a specification, not from that code).
    """

    merges = True
    first_merge = 0.9
    prop_attn = True
    prunes = True
    needs = frozenset({"k", "column"})
