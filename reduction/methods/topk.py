"""Top-K: keep the tokens that the class token attends to most."""

from __future__ import annotations

from reduction.base import Card
from reduction.mixins.ranking import ScoreReducer
from reduction.registry import register


@register("topk")
class TopK(ScoreReducer):
    """Keep the patches with the highest attention from the class token, mean over heads.

    The pruning half of EViT, studied on its own by Haurum et al.

    Args:
        score_from: "class" (the paper's) or "column_mean" (attention received from all tokens;
            ours, for models without a class token).
        score: Rank by another score, see `ranked`; None is `score_from`.
        seed: Of the score "random", see `random`.

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
    drops = True

    def __init__(
        self, score_from: str = "class", score: str | None = None, seed: int | None = None
    ) -> None:
        super().__init__(score_from, score, seed)
