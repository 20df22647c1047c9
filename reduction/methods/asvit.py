"""AS-ViT: thresholds on class attention, weighed by what each head does to a token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reduction.assignment import Keep, apply
from reduction.base import Card, Reducer
from reduction.checks import boolean, count, listed, number, one_of, positive, share
from reduction.counts import Spec, Step
from reduction.errors import ZooError
from reduction.functional import thresholds
from reduction.mixins.adaptive import Adaptive
from reduction.mixins.following import Follows
from reduction.mixins.learned import Learned
from reduction.mixins.masking import Masked
from reduction.mixins.training import Outcome, Trains
from reduction.registry import register
from reduction.tokens import Signals, Tokens, take_rows

MODES = ("last", "sum", "ema")
_FIRST = {"last": (0.001, 0.002, 0.003), "sum": (0.004, 0.012, 0.02), "ema": (0.001, 0.002, 0.003)}


def weighted_class_attention(row: Tensor, out: Tensor, prefix: int) -> Tensor:
    """Attention of the class token, each head by its share in what a token gets, `(B, N)`.

    Args:
        row: What the class token pays, `(B, H, P+N)`.
        out: What each head puts out, `(B, H, P+N, d)`.
        prefix: P.
    """
    exact = torch.promote_types(row.dtype, torch.float32)
    length = torch.linalg.vector_norm(out[:, :, prefix:], dim=-1, dtype=exact)
    part = length / (length.sum(1, keepdim=True) + 1e-8)
    weighed: Tensor = row[:, :, prefix:].to(exact) * part
    return weighed.sum(1)


@register("asvit")
class ASViT(Adaptive, Learned, Trains, Follows, Masked, Reducer):
    """Adaptive Sparse ViT: learned thresholds on a score that costs nothing but the class row.

    A token's score in a block is the attention that the class token pays it, summed over heads,
    each weighed by the share of the head's output in what the token gets. Before a block where the
    schedule has a step, tokens whose score `g` is not above the threshold of that stage leave.

    Args:
        accumulate: "last": `g` is the score of the block before; "sum": of all blocks so far;
            "ema": a running mean with `beta`.
        beta: Of "ema".
        first: First block whose score counts; there is no step before it is over.
        start: First thresholds of the stages; None is the paper's, continued evenly for more
            stages than three.
        limit: Never keep more than the schedule says (ours); the highest scores stay.
        tau: Width of the sigmoid in the backward pass.
        budget_weight: Factor of the distance of the cost to that of `keep_ratio`.
        keep_ratio: Cost that training aims at, as a share of the dense blocks'; None: that of the
            schedule's counts.
        distill_weight: Factor of the distillation of logits, and of tokens, from the dense model.

    Raises:
        ZooError: If an argument is out of range.

    References:
        Liu et al., IJCAI 2023, arXiv 2209.13802; official code github.com/Cydia2018/AS-ViT (no
        licence; this implementation is written from a specification).
    """

    card = Card(
        title="Adaptive Sparse ViT: Towards Learnable Adaptive Token Pruning by Fully Exploiting "
        "Self-Attention",
        authors="Liu et al.",
        venue="IJCAI",
        year=2023,
        arxiv="2209.13802",
        code="https://github.com/Cydia2018/AS-ViT",
        licence="none",
        kind="prune",
        training="thresholds and backbone, with the dense model as teacher",
        note="Inference is reproduced; the released training does not run, so that part is read.",
    )
    site = "pre"
    needs = frozenset({"cls_row", "out"})
    added_tokens = "spare"
    by_token = frozenset({"score"})

    def __init__(
        self,
        accumulate: str = "last",
        beta: float = 0.99,
        first: int = 2,
        start: Sequence[float] | None = None,
        limit: bool = True,
        tau: float = 1e-4,
        budget_weight: float = 2.0,
        keep_ratio: float | None = None,
        distill_weight: float = 0.5,
    ) -> None:
        super().__init__()
        self.accumulate = one_of("accumulate", accumulate, MODES)
        self.beta = share("beta", beta)
        self.first = count("first", first, 0)
        self.start = None if start is None else [number("start", v) for v in listed("start", start)]
        self.limit = self.limited = boolean("limit", limit)
        self.tau = positive("tau", tau)
        self.budget_weight = number("budget_weight", budget_weight, 0)
        self.keep_ratio = share("keep_ratio", keep_ratio, zero=False, null=True)
        self.distill_weight = number("distill_weight", distill_weight, 0)
        self.needs_teacher = distill_weight > 0
        self.thresholds: nn.Parameter | None = None
        self._blocks: tuple[int, ...] = ()
        self._width, self._goal = 1, 1.0

    # ------------------------------------------------------------------ learned parts

    def setup(self, spec: Spec) -> None:
        """One threshold per stage, unless they are there."""
        self._blocks = tuple(step.block for step in spec.stages)
        stages = len(self._blocks)
        if self.start is not None and len(self.start) != stages:
            raise ZooError(
                f"start must hold one threshold for each of the {stages} stages, got {self.start}"
            )
        if self.thresholds is None or len(self.thresholds) != stages:
            first = self.start or _continued(_FIRST[self.accumulate], stages)
            self.thresholds = nn.Parameter(torch.tensor(first)) if stages else None
        length = spec.prefix + spec.grid[0] * spec.grid[1]
        self._width, left, costs = spec.width, length, []
        for step in spec.steps:
            left = left if step is None else spec.prefix + step.keep
            costs.append(_block_gmacs(left, spec.width))
        self._goal = float(sum(costs) / (spec.depth * _block_gmacs(length, spec.width)))

    def threshold(self, step: Step) -> Tensor:
        """The threshold of a stage.

        Raises:
            ZooError: If the model was not built for a step in this block.
        """
        if step.block not in self._blocks or self.thresholds is None:
            raise ZooError(
                f"asvit has thresholds for blocks {list(self._blocks)}, but the schedule reduces "
                f"in block {step.block}; build the model with that schedule"
            )
        return self.thresholds[self._blocks.index(step.block)]

    # ------------------------------------------------------------------ scores

    def acts(self, block: int, depth: int) -> bool:
        return block > self.first

    def listens(self, block: int, steps: Sequence[Step | None]) -> bool:
        stages = [i for i, step in enumerate(steps) if step is not None]
        if not stages or not self.first <= block < stages[-1]:
            return False
        return self.accumulate != "last" or block + 1 in stages

    def observe(self, t: Tokens, s: Signals, block: int) -> Tokens:
        """Note the score of the tokens that are here."""
        seen = weighted_class_attention(s.need("cls_row"), s.need("out"), t.prefix)
        old = t.memory.get("score")
        if old is not None:
            seen = seen[:, : old.shape[1]]  # behind them is what plugins added
            if self.accumulate == "sum":
                seen = old + seen
            elif self.accumulate == "ema":
                seen = self.beta * old + (1 - self.beta) * seen
        return t._replace(memory={**t.memory, "score": seen})

    # ------------------------------------------------------------------ removal and masks

    def count(self, n: int, step: Step) -> int:
        return min(n, step.keep) if self.limit else n

    def remove(self, t: Tokens, s: Signals, step: Step) -> Tokens:
        score = self._score(t, s).detach()
        live = torch.ones_like(score, dtype=torch.bool)
        if t.mask is not None:
            live = t.mask[:, t.prefix :]
        keep = step.keep if self.limit else None
        kept = thresholds.survivors(score, live, self.threshold(step).detach(), keep)
        index = torch.arange(t.n, device=score.device).expand_as(kept)
        chosen = thresholds.packed(index, kept, None, None, *thresholds.lengths(kept, keep))
        assert isinstance(chosen, Keep)
        out = apply(t, chosen)
        return out._replace(memory={**out.memory, "score": take_rows(score, chosen.index)})

    def mask(self, t: Tokens, s: Signals, step: Step) -> Tokens:
        """Mask what would leave now; what an earlier stage masked may come back."""
        score, threshold = self._score(t, s), self.threshold(step)
        kept = thresholds.straight_through(score > threshold, score, threshold, self.tau)
        policy = torch.cat([t.size.new_ones(t.size[:, : t.prefix].shape), kept.float()], dim=1)
        return t._replace(policy=policy)

    def _score(self, t: Tokens, s: Signals) -> Tensor:
        found = t.memory.get("score")
        if found is None:  # called by itself, on the signals of one block
            found = weighted_class_attention(s.need("cls_row"), s.need("out"), t.prefix)
        return found[:, : t.n]

    # ------------------------------------------------------------------ losses

    def auxiliary_losses(self, outcome: Outcome) -> dict[str, Tensor]:
        policies = [t.policy for t in outcome.trace]
        length = outcome.final.x.shape[1]
        dense = len(policies) * _block_gmacs(length, self._width)
        cost = sum(
            _block_gmacs(length if p is None else p.sum(1).mean(), self._width) for p in policies
        )
        goal = self._goal if self.keep_ratio is None else self.keep_ratio
        gap = torch.as_tensor(cost - goal * dense, device=outcome.logits.device).abs()
        losses = {"budget": self.budget_weight * gap}
        if outcome.teacher is None or not self.distill_weight:
            return losses
        logits = _divergence(outcome.logits, outcome.teacher.logits).mean()
        n = outcome.teacher.final.n
        token = _divergence(outcome.final.patches[:, :n], outcome.teacher.final.patches)
        last = policies[-1]
        assert last is not None
        kept = (last[:, outcome.final.prefix :][:, :n] > 0.5).detach().to(token.dtype)
        token = (token * kept).sum() / kept.sum().clamp_min(1)
        weight = self.distill_weight
        return losses | {"logits": weight * logits, "token": weight * token}


def _continued(values: tuple[float, ...], stages: int) -> list[float]:
    """The first thresholds, and more of them at the same distance."""
    step = values[-1] - values[-2]
    more = [values[-1] + step * (i + 1) for i in range(max(0, stages - len(values)))]
    return [*values, *more][:stages]


def _block_gmacs(n: float | Tensor, width: int) -> float | Tensor:
    return (12 * n * width * width + 2 * n * n * width) / 1e9


def _divergence(ours: Tensor, theirs: Tensor) -> Tensor:
    """Of the teacher's distribution from the student's, over the last dimension."""
    ours, theirs = ours.log_softmax(-1), theirs.log_softmax(-1)
    return F.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1)
