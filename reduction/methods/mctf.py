"""MCTF: fuse tokens by similarity, informativeness and size, with attention one step ahead."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from reduction.assignment import Keep, Merge, apply
from reduction.base import Card, Site
from reduction.checks import boolean, count, number, one_of, share
from reduction.counts import Dims, Step
from reduction.functional.clustering import mean_shares
from reduction.functional.fusion import fuse_map, one_way_partners, two_way_matching
from reduction.functional.joining import Decision, Partners
from reduction.functional.matching import split_sizes, unit
from reduction.functional.received import column_mean, mean_row
from reduction.functional.thresholds import live_first
from reduction.mixins.attention import AttentionInput, AttentionOutput, OwnAttention
from reduction.mixins.calibrating import Calibrates
from reduction.mixins.consistency import class_gap, confident
from reduction.mixins.pairing import Pairs
from reduction.mixins.training import Outcome, Trains
from reduction.registry import register
from reduction.schedules.base import Schedule
from reduction.schedules.part import Part
from reduction.tokens import Signals, Tokens, take_rows

POOLING = ("attention", "size", "max", "mean")


@register("mctf")
class MCTF(OwnAttention, Trains, Pairs):
    """Multi-criteria Token Fusion with one-step-ahead attention.

    Tokens alternate between two sets; the attraction of a pair is the product of

        ((cos(x_a, x_b) + 1) / 2)^(1/tau_sim)     similar features of the residual stream
        (c_a c_b)^(1/tau_info)                    little attention received: c = (1/g) / max(1/g)
        (e_a e_b)^(1/tau_size)                    few patches: e = (1/s) / max(1/s)

    where g is the mean attention that a token receives in this block. Half of the r tokens leave
    the first set for the second, the rest the other way round. A group is the mean weighted by
    `g s`. The map that gave g serves once more: its keys are summed and its queries averaged by
    group, and it weighs the values of the fused tokens.

    Args:
        osa: One-step-ahead attention: 1 fuses the map and uses it again; 2 computes it anew from
            the fused tokens, with their sizes; 0 is none, and fuses the block's output.
        tau_sim: Temperature of similarity; 0 switches the criterion off.
        tau_info: Temperature of informativeness; likewise.
        tau_size: Temperature of size; likewise.
        both: Two-way matching; False is one way, from the first set to the second.
        pooling: Weights in a group: "attention" (`g s`), "size", "mean" (all alike), or "max", the
            largest entry of features and of query rows.
        prop_attn: Proportional attention.
        floor: Tokens below which nothing is fused; the official code has 9, and the class token.
        teacher_share: In training, a second pass removes up to this share of the tokens that the
            schedule removes; the share is drawn anew in every step. None: no second pass.
        teacher_weight: Factor of that pass's cross-entropy.
        consistency: Factor of the squared difference of the two class tokens.
        confidence: Images enter the difference whose label gets a probability above this.

    Raises:
        ZooError: If an argument is out of range.

    References:
        Lee et al., CVPR 2024, arXiv 2403.10030; official code github.com/mlvlab/MCTF (MIT, with
        parts derived from ToMe; this implementation is written from a specification).
    """

    card = Card(
        title="Multi-criteria Token Fusion with One-step-ahead Attention for Efficient Vision "
        "Transformers",
        authors="Lee et al.",
        venue="CVPR",
        year=2024,
        arxiv="2403.10030",
        code="https://github.com/mlvlab/MCTF",
        licence="MIT (parts CC-BY-NC 4.0)",
        kind="merge",
        training="fine-tuning recommended, with a second pass that removes less",
        note="Needs the whole attention map in reducing blocks, so no fused kernel there.",
    )
    site: Site = "attn"
    family = "constant_r"

    def __init__(
        self,
        osa: int = 1,
        tau_sim: float = 1.0,
        tau_info: float = 20.0,
        tau_size: float = 40.0,
        both: bool = True,
        pooling: str = "attention",
        prop_attn: bool = True,
        floor: int = 1,
        teacher_share: float | None = 0.5,
        teacher_weight: float = 1.0,
        consistency: float = 3.0,
        confidence: float = 0.4,
    ) -> None:
        super().__init__()
        self.osa = one_of("osa", osa, (0, 1, 2))
        self.tau_sim = number("tau_sim", tau_sim, 0)
        self.tau_info = number("tau_info", tau_info, 0)
        self.tau_size = number("tau_size", tau_size, 0)
        self.both = boolean("both", both)
        self.pooling = one_of("pooling", pooling, POOLING)
        self.prop_attn = boolean("prop_attn", prop_attn)
        self.floor = count("floor", floor)
        self.teacher_share = share("teacher_share", teacher_share, null=True)
        self.teacher_weight = number("teacher_weight", teacher_weight, 0)
        self.consistency = number("consistency", consistency, 0)
        self.confidence = share("confidence", confidence)
        if osa == 0:
            self.site = "post"
            self.needs = frozenset({"column"})
        else:
            self.rereads = "values" if osa == 1 else "all"

    def max_drop(self, n: int) -> int:
        return max(0, min(n // 2, n - self.floor))

    # -- which tokens ------------------------------------------------------------------------------

    @torch.no_grad()
    def attraction(self, t: Tokens, column: Tensor) -> Tensor:
        """Attraction of the reducible tokens of the two sets, `(B, A, B')`.

        Args:
            t: Tokens.
            column: Attention that each token receives, `(B, P+N)`.
        """
        first = t.prefix & 1
        senders, receivers = split_sizes(t.n, t.prefix)
        out = t.size.new_ones(t.x.shape[0], senders, receivers)

        def pairs(score: Tensor, tau: float) -> Tensor:
            # The largest is over all tokens, prefix included.
            score = score if t.mask is None else score.masked_fill(~t.mask, 0.0)
            score = (score / score.amax(1, keepdim=True))[:, t.prefix :] ** (1 / tau)
            return score[:, first::2].unsqueeze(2) * score[:, 1 - first :: 2].unsqueeze(1)

        if self.tau_sim:
            x = unit(t.patches.to(torch.promote_types(t.x.dtype, torch.float32)))
            cosine = x[:, first::2] @ x[:, 1 - first :: 2].transpose(1, 2)
            out = ((cosine.to(out.dtype) + 1) / 2).clamp(0, 1) ** (1 / self.tau_sim)
        if self.tau_info:
            received = column.to(out.dtype).clamp_min(torch.finfo(out.dtype).tiny)
            out = out * pairs(1 / received, self.tau_info)
        if self.tau_size:
            out = out * pairs(1 / t.size, self.tau_size)
        return out

    @torch.no_grad()
    def _grouped(self, t: Tokens, column: Tensor, step: Step) -> Merge:
        weight = self.attraction(t, column)
        groups = two_way_matching(weight, t.n - step.keep, t.prefix & 1, self.both)
        return self._shared(t, column, Merge(*groups))

    @torch.no_grad()
    def _shared(self, t: Tokens, column: Tensor, a: Merge) -> Merge:
        """Groups with the weights of their members."""
        assert a.slot is not None
        if self.pooling == "size":
            return a
        share = t.patch_size
        if self.pooling == "attention":
            received = column[:, t.prefix :].to(share.dtype)
            # A token that nobody looks at has a share in its group all the same.
            share = share * received.clamp_min(torch.finfo(share.dtype).tiny ** 0.5)
        else:
            share = torch.ones_like(share)
        return a._replace(coef=_shares(share, a))

    def _merging(self, t: Tokens, column: Tensor, step: Step) -> tuple[Tokens, Merge]:
        """Who merges, by counts or by thresholds, and tokens that remember the threshold."""
        if not isinstance(self, Calibrates):
            return t, self._grouped(t, column, step)
        s = Signals(column=column)
        t, d = self.decided(t, s, step)
        return t, self.joins(t, s, step, d)

    def partners(self, t: Tokens, s: Signals, step: Step) -> Partners:
        """One way: whatever a second would find above a threshold has left already."""
        rows, live = live_first(t)
        first, column = t.prefix & 1, s.need("column").detach()
        if t.mask is not None:
            t = apply(t, Keep(rows))
            column = torch.cat([column[:, : t.prefix], take_rows(column[:, t.prefix :], rows)], 1)
        best, host = one_way_partners(self.attraction(t, column), live, first)
        count = live.sum(1)
        most = torch.minimum((count + t.prefix - 1) // 2, count - self.floor).clamp_min(0)
        return Partners(rows, live, best, host, first, t.prefix, most)

    def joins(self, t: Tokens, s: Signals, step: Step, d: Decision) -> Merge:
        return self._shared(t, s.need("column").detach(), d.joined(t))

    def unite(self, t: Tokens, s: Signals, step: Step, d: Decision) -> Tokens:
        return self._fused(t, self.joins(t, s, step, d))

    def _fused(self, t: Tokens, merge: Merge) -> Tokens:
        out = apply(t, merge)
        if self.pooling != "max":
            return out
        assert merge.slot is not None
        m = merge.leader.shape[1]
        index = _bins(merge).unsqueeze(2).expand_as(t.patches)
        x = t.x.new_zeros(t.x.shape[0], m + 1, t.x.shape[2])
        x = x.scatter_reduce(1, index, t.patches, "amax", include_self=False)[:, :m]
        return out._replace(x=torch.cat([t.x[:, : t.prefix], x], 1))

    # -- where -------------------------------------------------------------------------------------

    def inside(self, t: Tokens) -> bool:
        return self.osa > 0

    def attend(self, a: AttentionInput, t: Tokens, step: Step | None) -> AttentionOutput | None:
        if step is None or (isinstance(self, Calibrates) and self.idle(step)):
            return None
        assert a.again is not None
        if self.osa == 2:
            with torch.no_grad():
                column = column_mean(a.q, a.k, a.scale, a.bias, t.mask)
            new = self._fused(*self._merging(t, column, step))
            b = a.again(new, False)
            out, _ = b._replace(fused=a.fused, drop=a.drop).usual()
            return AttentionOutput(out, Signals(), new)
        logits = (a.q * a.scale) @ a.k.transpose(-2, -1)
        if a.bias is not None:
            logits = logits + a.bias
        map_ = logits.softmax(-1)
        t, merge = self._merging(t, mean_row(map_.detach(), t.mask), step)
        new = self._fused(t, merge)
        map_ = self._fused_map(t, map_, merge, merge.leader.shape[1]).to(a.q.dtype)
        out = a.dropped(map_) @ a.again(new, True).v
        return AttentionOutput(out, Signals(), new)

    def _fused_map(self, t: Tokens, map_: Tensor, merge: Merge, keep: int) -> Tensor:
        batch, p = map_.shape[0], t.prefix
        slot = _bins(merge) + p
        slot = torch.cat([torch.arange(p, device=t.x.device).expand(batch, p), slot], 1)
        share = None
        if self.pooling != "max":
            own = merge.coef
            if own is None:
                own = _shares(t.patch_size, merge)
            share = torch.cat([own.new_ones(batch, p), own], 1)
        if not isinstance(self, Calibrates):
            return fuse_map(map_, slot, share, p + keep)
        # Padding, in the last place, is nobody.
        return fuse_map(map_, slot, share, p + keep + 1)[:, :, : p + keep, : p + keep]

    def reduce(self, t: Tokens, s: Signals, step: Step) -> Tokens:
        """Fuse the output of a block (osa 0)."""
        return self._fused(t, self._grouped(t, s.need("column").detach(), step))

    # -- training ----------------------------------------------------------------------------------

    def peer(self, schedule: Schedule) -> Schedule | None:
        if self.teacher_share is None or isinstance(self, Calibrates):
            return None  # thresholds hear no schedule
        return Part(schedule, self.teacher_share * torch.rand(()).item())

    def auxiliary_losses(self, outcome: Outcome) -> dict[str, Tensor]:
        if outcome.teacher is None:
            return {}
        ce = F.cross_entropy(outcome.teacher.logits, outcome.targets)
        sure = confident(outcome.logits, outcome.targets, self.confidence)
        gap = (class_gap(outcome) * sure).sum() / sure.sum().clamp_min(1)
        return {"teacher": self.teacher_weight * ce, "consistency": self.consistency * gap}

    # -- cost --------------------------------------------------------------------------------------

    def macs(self, n: int, prefix: int, step: Step, dims: Dims) -> int:
        senders, receivers = split_sizes(n, prefix)
        return senders * receivers * dims.width if self.tau_sim else 0

    def attention_macs(self, n: int, kept: int, width: int) -> int:
        # The map of all tokens, then either its use for the fused ones or their own attention.
        return (n * n + kept * kept * (1 if self.osa == 1 else 2)) * width


def _bins(a: Merge) -> Tensor:
    """Groups of tokens, `(B, N)`; padding is in one of its own behind all."""
    assert a.slot is not None
    return torch.where(a.slot < 0, a.leader.shape[1], a.slot)


def _shares(weight: Tensor, a: Merge) -> Tensor:
    """Weights as shares of the groups, `(B, N)`."""
    return mean_shares(weight, _bins(a), a.leader.shape[1] + 1)
