"""SiT: self-slimmed tokens, with the reverse module that distils them."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reduction.assignment import Mix
from reduction.base import Card, Reducer
from reduction.checks import boolean, number, positive
from reduction.counts import Dims, Spec, Step
from reduction.errors import ZooError
from reduction.mixins.learned import Queries
from reduction.mixins.training import Outcome, Trains
from reduction.registry import register
from reduction.tokens import Signals, Tokens


class TokenSlimming(nn.Module):
    """Weights of M output tokens from each token's own features (TSM)."""

    def __init__(self, width: int, outputs: int, ratio: float = 0.5) -> None:
        super().__init__()
        self.outputs = outputs
        hidden = int(width * ratio)
        self.weight = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, outputs)
        )
        self.scale = nn.Parameter(torch.ones(1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Weights `(B, M, N)` of tokens `(B, N, C)`; rows sum to one."""
        weights: Tensor = (self.weight(x) * self.scale).softmax(1)
        return weights.transpose(1, 2)


class ReverseSlimming(nn.Module):
    """Expand M tokens back to P, for the distillation loss only (RTSM)."""

    def __init__(self, width: int, inputs: int, outputs: int, ratio: float = 4.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.mlp1 = _mlp(inputs, int(ratio * outputs), outputs)
        self.norm2 = nn.LayerNorm(width)
        self.mlp2 = _mlp(width, int(ratio * width), width)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens `(B, P, C)` from `(B, M, C)`."""
        u = self.mlp1(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        expanded: Tensor = u + self.mlp2(self.norm2(u))
        return expanded


def _mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.GELU(), nn.Linear(hidden, outputs))


def recalibration_loss(
    student: list[Tensor], teacher: list[Tensor], logits: Tensor, taught: Tensor, tau: float = 1.0
) -> dict[str, Tensor]:
    """Feature recalibration distillation, weights not included.

    Args:
        student: Recovered tokens per block, each `(B, P, C)`.
        teacher: The dense model's tokens, likewise.
        logits: Student logits `(B, K)`.
        taught: Teacher logits `(B, K)`.
        tau: Temperature.

    Returns:
        "token": mean over blocks of the squared error; "logits": `tau^2 KL(teacher || student)`.
    """
    pairs = [F.mse_loss(a, b) for a, b in zip(student, teacher, strict=True)]
    kl = F.kl_div(
        (logits / tau).log_softmax(-1),
        (taught / tau).log_softmax(-1),
        reduction="batchmean",
        log_target=True,
    )
    return {"token": torch.stack(pairs).mean(), "logits": tau**2 * kl}


@register("sit")
class SiT(Queries, Trains, Reducer):
    """Each output token is a weighted mean of all tokens, with weights that every token predicts.

    Before the block: `y = softmax_over_tokens(scale * MLP(x))^T @ x`. With `distill`, training adds
    the paper's recalibration: at every block the tokens are expanded back to all patches by a
    learned reverse module and compared with the dense model's.

    Args:
        distill: Add the distillation losses in training; needs the dense model as teacher.
        token_weight: Factor of the token loss.
        logit_weight: Factor of the logit loss.
        tau: Temperature of the logit loss.

    Raises:
        ZooError: If `tau` is not positive.

    References:
        Zong et al., ECCV 2022, arXiv 2111.12624; official code github.com/Sense-X/SiT (MIT).
    """

    card = Card(
        title="Self-slimmed Vision Transformer",
        authors="Zong et al.",
        venue="ECCV",
        year=2022,
        arxiv="2111.12624",
        code="https://github.com/Sense-X/SiT",
        licence="MIT",
        kind="soft pooling",
        training="slimming modules, with the backbone",
        note="The slimming modules are learned: train before use.",
    )
    site = "pre"

    def __init__(
        self,
        distill: bool = False,
        token_weight: float = 2.0,
        logit_weight: float = 2.0,
        tau: float = 1.0,
    ) -> None:
        super().__init__()
        self.distill = boolean("distill", distill)
        self.token_weight = number("token_weight", token_weight, 0)
        self.logit_weight = number("logit_weight", logit_weight, 0)
        self.tau = positive("tau", tau)
        self.needs_teacher = distill
        # The reverse modules are made for so many tokens and no more.
        self.added_tokens = "refuse" if distill else "reduce"
        self.reverse = nn.ModuleList()

    def build(self, spec: Spec, step: Step) -> nn.Module:
        return TokenSlimming(spec.width, step.keep)

    def setup(self, spec: Spec) -> None:
        super().setup(spec)
        if not self.distill or len(self.reverse):
            return
        total = spec.grid[0] * spec.grid[1]
        n, parts = total, []
        for step in spec.steps:
            n = n if step is None else step.keep
            slim = ReverseSlimming(spec.width, n, total) if n < total else nn.Identity()
            parts.append(slim)
        self.reverse = nn.ModuleList(parts)

    def assign(self, t: Tokens, s: Signals, step: Step) -> Mix:
        return Mix(cast(TokenSlimming, self.stage(step))(t.patches))

    def auxiliary_losses(self, outcome: Outcome) -> dict[str, Tensor]:
        if not self.distill:
            return {}
        if outcome.teacher is None:
            raise ZooError("sit with distill=true needs the dense model's outcome as teacher")
        student = [part(t.patches) for part, t in zip(self.reverse, outcome.trace, strict=True)]
        teacher = [t.patches for t in outcome.teacher.trace]
        losses = recalibration_loss(
            student, teacher, outcome.logits, outcome.teacher.logits, self.tau
        )
        return {
            "token": self.token_weight * losses["token"],
            "logits": self.logit_weight * losses["logits"],
        }

    def macs(self, n: int, prefix: int, step: Step, dims: Dims) -> int:
        outputs, hidden = self.count(n, step), int(dims.width * 0.5)
        return n * (dims.width * hidden + hidden * outputs + outputs * dims.width)
