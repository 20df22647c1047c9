"""EViT: keep attentive tokens, fuse the rest into one."""

from __future__ import annotations

import math

from reduction.assignment import Assignment, Fuse, Keep
from reduction.base import Card, Reducer
from reduction.counts import Dims, Step
from reduction.errors import ZooError
from reduction.mixins.ranking import attention_score, score_signal
from reduction.registry import register
from reduction.tokens import Signals, Tokens


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
class EViT(Reducer):
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

    def __init__(self, fuse: bool = True, score_from: str = "class") -> None:
        super().__init__()
        if not isinstance(fuse, bool):
            raise ZooError(f"fuse must be true or false, got {fuse!r}")
        self.fuse = fuse
        self.score_from = score_from
        self.needs = score_signal(score_from)

    def count(self, n: int, step: Step) -> int:
        return n if step.keep >= n else step.keep + self.fuse

    def assign(self, t: Tokens, s: Signals, step: Step) -> Assignment:
        score = attention_score(s, self.score_from, t.prefix)
        if not self.fuse:
            return Keep(score.detach().topk(step.keep, dim=1, sorted=False).indices)
        # The first dropped token lends the fused one its position, being the most attended.
        leader = score.detach().topk(step.keep + 1, dim=1).indices
        return Fuse(leader, score.scatter(1, leader[:, :-1], 0.0))

    def macs(self, n: int, prefix: int, step: Step, dims: Dims) -> int:
        return n * dims.width if self.fuse else 0
