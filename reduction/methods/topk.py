"""Top-K: keep the tokens that the class token attends to most."""

from __future__ import annotations

from torch import Tensor

from reduction.base import Card
from reduction.counts import Step
from reduction.mixins.ranking import ScoreReducer, attention_score, score_signal
from reduction.registry import register
from reduction.tokens import Signals, Tokens


@register("topk")
class TopK(ScoreReducer):
    """Keep the patches with the highest attention from the class token, mean over heads.

    The pruning half of EViT, studied on its own by Haurum et al.

    Args:
        score_from: "class" (the paper's) or "column_mean" (attention received from all tokens;
            ours, for models without a class token).

    References:
        Haurum et al., ICCVW 2023, arXiv 2308.04657; official code
        github.com/JoakimHaurum/TokenReduction (MIT).
    """

    card = Card(
        title="Which Tokens to Use? Investigating Token Reduction in Vision Transformers",
        authors="Haurum et al.",
        venue="ICCVW",
        year=2023,
        arxiv="2308.04657",
        code="https://github.com/JoakimHaurum/TokenReduction",
        licence="MIT",
        kind="prune",
        training="fine-tuning recommended",
    )
    site = "mid"

    def __init__(self, score_from: str = "class") -> None:
        super().__init__()
        self.score_from = score_from
        self.needs = score_signal(score_from)

    def score(self, t: Tokens, s: Signals, step: Step) -> Tensor:
        return attention_score(s, self.score_from, t.prefix)
