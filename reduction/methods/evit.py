"""EViT: keep attentive tokens, fuse the rest into one."""

from __future__ import annotations

import math

from torch import Tensor

from reduction.assignment import Assignment, Keep
from reduction.base import Card
from reduction.checks import boolean
from reduction.counts import Dims, Step
from reduction.functional.settling import fuse as fused
from reduction.mixins.ranking import ScoreReducer
from reduction.registry import register
from reduction.tokens import Tokens


def keep_rate_at(iteration: int, rate: float, start: int, length: int) -> float:
    """Keep rate while EViT trains: 1 at first, then a cosine down to `rate`.

    Args:
        iteration: Iterations since the beginning of training; may be negative.
        rate: Final keep rate in (0, 1].
        start: Iterations with keep rate 1.
        length: Iterations of the descent.

    References:
        EViT, arXiv 2202.07800; official code github.com/youweiliang/evit (Apache-2.0).
    """
    if iteration < start:
        return 1.0
    if iteration >= start + length:
        return rate
    return rate + (1 - rate) * (math.cos(math.pi * (iteration - start) / length) + 1) / 2


@register("evit")
class EViT(ScoreReducer):
    """Keep the patches that the class token attends to most and append their opposite.

    The dropped tokens become one token, the sum of their features weighted by the class token's
    attention. The weights are not normalised, in the official code as here (the paper's text says
    weighted average). The fused token is an ordinary one later: it may be kept, or fused again.

    The official count rule is `schedule=keep_rate of=current rounding=ceil`, the one of Haurum et
    al. the schedule's default. Counts are of kept tokens; the fused one comes on top.

    Args:
        fuse: Append the fused token. Without it EViT is Top-K.
        score_from: "class" (the paper's) or "column_mean" (attention received from all tokens;
            ours, for models without a class token).
        score: Rank by another score, see `ranked`; None is `score_from`.
        seed: Of the score "random", see `random`.

    References:
        Liang et al., ICLR 2022, arXiv 2202.07800; official code github.com/youweiliang/evit
        (Apache-2.0).
    """

    card = Card(
        title="Not All Patches are What You Need: Expediting Vision Transformers via Token "
        "Reorganizations",
        authors="Liang et al.",
        venue="ICLR",
        year=2022,
        arxiv="2202.07800",
        code="https://github.com/youweiliang/evit",
        licence="Apache-2.0",
        kind="prune + fuse",
        training="fine-tuning recommended",
    )
    site = "mid"

    def __init__(
        self,
        fuse: bool = True,
        score_from: str = "class",
        score: str | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(score_from, score, seed)
        self.fuse = boolean("fuse", fuse)

    def count(self, n: int, step: Step) -> int:
        return n if step.keep >= n else step.keep + self.fuse

    def order(self, t: Tokens, score: Tensor, step: Step) -> Tensor:
        # The first dropped token lends the fused one its position, being the most attended.
        return score.topk(step.keep + self.fuse, dim=1, sorted=self.fuse).indices

    def settle(
        self, t: Tokens, kept: Tensor, rest: Tensor, score: Tensor, step: Step
    ) -> Assignment:
        return fused(kept, rest, score) if self.fuse else Keep(kept)

    def macs(self, n: int, prefix: int, step: Step, dims: Dims) -> int:
        return n * dims.width if self.fuse else 0
