"""DynamicViT: small predictors learn which tokens to keep."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reduction.assignment import Assignment, Keep, Merge, apply
from reduction.base import Card
from reduction.checks import listed, number, share
from reduction.counts import Dims, Spec, Step
from reduction.errors import ZooError
from reduction.mixins.following import Extends
from reduction.mixins.learned import Staged
from reduction.mixins.masking import Masked
from reduction.mixins.ranking import ScoreReducer
from reduction.mixins.training import Outcome, Trains
from reduction.registry import register
from reduction.tokens import Signals, Tokens


class Predictor(nn.Module):
    """Log-probabilities of keeping and dropping each token, `(B, N, 2)`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_conv = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU())
        self.out_conv = nn.Sequential(
            nn.Linear(width, width // 2),
            nn.GELU(),
            nn.Linear(width // 2, width // 4),
            nn.GELU(),
            nn.Linear(width // 4, 2),
        )

    def forward(self, x: Tensor, kept: Tensor | None = None) -> Tensor:
        """Score tokens.

        Args:
            x: `(B, N, C)`.
            kept: Decisions so far, `(B, N)`; None where all are kept.
        """
        x = self.in_conv(x)
        local, context = x.chunk(2, dim=-1)
        if kept is None:
            mean = context.mean(1, keepdim=True)
        else:
            weight = kept.unsqueeze(-1)
            # The official code divides by zero where an image has lost all its tokens.
            total = weight.sum(1, keepdim=True).clamp_min(1)
            mean = (context * weight).sum(1, keepdim=True) / total
        x = torch.cat([local, mean.expand_as(context)], dim=-1)
        scores: Tensor = self.out_conv(x).log_softmax(-1)
        return scores


def gumbel_noise(shape: torch.Size, device: torch.device) -> Tensor:
    """Standard Gumbel noise."""
    return -torch.empty(shape, device=device).exponential_().log()


def keep_decision(log_probs: Tensor, noise: Tensor) -> Tensor:
    """Hard keep decisions `(B, N)` with the gradient of the soft ones."""
    soft = (log_probs + noise).softmax(-1)
    hard = F.one_hot(soft.argmax(-1), 2).to(soft.dtype)
    return (hard - soft.detach() + soft)[..., 0]


def leaders(a: Assignment) -> Tensor:
    """The tokens that go on, `(B, M)`."""
    return a.index if isinstance(a, Keep) else cast(Merge, a).leader


@register("dynamicvit")
class DynamicViT(Staged, Extends, Masked, Trains, ScoreReducer):
    """Keep the tokens that a learned predictor rates highest.

    In evaluation the top `keep` tokens by keep log-probability survive each stage. In training
    nothing is removed: straight-through Gumbel decisions mask tokens in the attention of that
    block and all later ones, and three losses are added: the kept share against the schedule's, KL
    to the dense model's logits, and squared error to its tokens.

    Args:
        ratio_weight: Factor of the ratio loss.
        logit_weight: Factor of the logit loss.
        token_weight: Factor of the token loss.
        ratios: Kept share of each stage that the ratio loss aims at; None: what the schedule keeps.
        class_weight: Factor of the classification loss.

    Raises:
        ZooError: If an argument is out of range.

    References:
        Rao et al., NeurIPS 2021, arXiv 2106.02034; official code github.com/raoyongming/DynamicViT
        (MIT).
    """

    card = Card(
        title="DynamicViT: Efficient Vision Transformers with Dynamic Token Sparsification",
        authors="Rao et al.",
        venue="NeurIPS",
        year=2021,
        arxiv="2106.02034",
        code="https://github.com/raoyongming/DynamicViT",
        licence="MIT",
        kind="prune",
        training="predictors and backbone, with the dense model as teacher",
        note="An untrained predictor keeps arbitrary tokens.",
    )
    site = "pre"
    drops = True
    needs_teacher = True

    def __init__(
        self,
        ratio_weight: float = 2.0,
        logit_weight: float = 0.5,
        token_weight: float = 0.5,
        ratios: list[float] | None = None,
        class_weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.class_weight = number("class_weight", class_weight, 0)
        self.ratio_weight = number("ratio_weight", ratio_weight, 0)
        self.logit_weight = number("logit_weight", logit_weight, 0)
        self.token_weight = number("token_weight", token_weight, 0)
        if ratios is not None:
            for ratio in listed("ratios", ratios):
                share("ratios", ratio)
            if not ratios:
                raise ZooError("ratios must hold one share per stage, got []")
        self.ratios = ratios

    def build(self, spec: Spec, step: Step) -> nn.Module:
        return Predictor(spec.width)

    def extended(self, t: Tokens, added: int) -> Tokens:
        """Tokens that a plugin adds are scored, but have no part in the predictor's context.

        So in evaluation, as in the code that combines DynamicViT with CLCA; there as here they
        have in training, where their policy is one.
        """
        if self.training:
            return t
        context = t.memory.get("context")
        if context is None:
            context = t.size.new_ones(t.x.shape[0], t.n - added)
        context = torch.cat([context, context.new_zeros(context.shape[0], added)], dim=1)
        return t._replace(memory={**t.memory, "context": context})

    def score(self, t: Tokens, s: Signals, step: Step) -> Tensor:
        context = t.memory.get("context")
        context = None if context is None else context[:, : t.n].to(t.x.dtype)
        scores: Tensor = cast(Predictor, self.stage(step))(t.patches, context)[..., 0]
        return scores

    def remove(self, t: Tokens, s: Signals, step: Step) -> Tokens:
        """Remove tokens, and their part in the predictor's context."""
        chosen = self.settled(t, self.assign(t, s, step))
        out, context = apply(t, chosen), t.memory.get("context")
        if context is None:
            return out
        # What is longer than the tokens here belongs to those that were left alone.
        context = torch.cat([context.gather(1, leaders(chosen)), context[:, t.n :]], dim=1)
        return out._replace(memory={**t.memory, "context": context})

    def mask(self, t: Tokens, s: Signals, step: Step) -> Tokens:
        """Mask tokens in this block's attention and all later ones.

        Blocks before the first stage use the same masked softmax, as in the official code.
        """
        assert t.policy is not None
        before = t.policy[:, t.prefix :]
        log_probs = cast(Predictor, self.stage(step))(t.patches, before)
        noise = gumbel_noise(log_probs.shape, log_probs.device).to(log_probs.dtype)
        kept = keep_decision(log_probs, noise) * before
        name = f"kept.{self._blocks.index(step.block)}"
        policy = torch.cat([t.policy[:, : t.prefix], kept.to(t.policy.dtype)], dim=1)
        return t._replace(policy=policy, memory={**t.memory, name: kept})

    def auxiliary_losses(self, outcome: Outcome) -> dict[str, Tensor]:
        memory = outcome.final.memory
        decisions = [memory[f"kept.{i}"] for i in range(len(self._blocks))]
        ratios = self.ratios if self.ratios is not None else self._shares
        ratio = torch.stack(
            [(d.mean(1) - r).square().mean() for d, r in zip(decisions, ratios, strict=True)]
        ).mean()
        losses = {"ratio": self.ratio_weight * ratio}
        if outcome.teacher is None or not decisions:
            return losses
        kl = F.kl_div(
            outcome.logits.log_softmax(-1),
            outcome.teacher.logits.log_softmax(-1),
            reduction="batchmean",
            log_target=True,
        )
        kept = (decisions[-1] > 0.5).detach()
        # What a plugin added stands behind the patches, and the teacher has none of it.
        n = outcome.teacher.final.n
        kept = kept[:, :n]
        gap = self.token_gap(outcome.final.patches[:, :n], outcome.teacher.final.patches)
        # The mean over kept tokens; zero where a batch has kept none.
        token = (gap * kept).sum() / kept.sum().clamp_min(1)
        return losses | {"logits": self.logit_weight * kl, "token": self.token_weight * token}

    def token_gap(self, tokens: Tensor, dense: Tensor) -> Tensor:
        """How far each token is from that of the dense model, `(B, N, C)` twice to `(B, N)`."""
        return (tokens - dense).square().mean(-1)

    def setup(self, spec: Spec) -> None:
        super().setup(spec)
        total = spec.grid[0] * spec.grid[1]
        self._shares = [step.keep / total for step in spec.stages]
        if self.ratios is not None and len(self.ratios) != len(self._shares):
            raise ZooError(
                f"ratios={list(self.ratios)}: expected one share per stage, and the schedule has "
                f"{len(self._shares)}"
            )

    def macs(self, n: int, prefix: int, step: Step, dims: Dims) -> int:
        c = dims.width
        return n * (c * c + c * (c // 2) + (c // 2) * (c // 4) + (c // 4) * 2)
