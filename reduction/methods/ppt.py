"""PPT: per image, prune where scores are uneven and pool where they are flat."""

from __future__ import annotations

import torch
from torch import Tensor

from reduction.assignment import Merge
from reduction.base import Card
from reduction.checks import boolean, count, number
from reduction.counts import Dims, Step
from reduction.functional.joining import Decision
from reduction.functional.matching import bipartite_matching, split_sizes
from reduction.functional.scores import significance
from reduction.functional.settling import prune_or_pool, prune_uneven
from reduction.mixins.pairing import ScoredPairs, live_tokens
from reduction.registry import register
from reduction.tokens import Signals, Tokens


@register("ppt")
class PPT(ScoredPairs):
    """Token Pruning and Pooling.

    Between attention and MLP, a token's significance is the attention that the class token pays it
    times the length of its value, normalised over the patches. Where it varies much, some patches
    are clearly dispensable and the least significant are pruned; where it is flat, similar tokens
    are pooled as in ToMe, into their size-weighted mean. Both leave as many tokens.

    The order of rows is part of the algorithm: patches by descending significance after pruning,
    ToMe's order after pooling.

    Args:
        threshold: Variance from which an image is pruned. The paper's: 7e-5 for DeiT-S off the
            shelf, 6e-5 for fine-tuned models. 0 always prunes, 1 always pools.
        patches: Patches in the image for which the threshold was chosen. For other grids it is
            scaled by `(patches / grid) ** 2`, because the variance of shares falls like that
            (ours). Null uses it as it is.
        prop_attn: Proportional attention. Without it pooling takes plain means, as in the official
            code, which then forgets the sizes before every stage.
        score_from: "class" (the paper's) or "column_mean" (attention received from all tokens;
            ours, for models without a class token).
        score: Another score than attention, see `ranked`; None is `score_from`.
        seed: Of the score "random", see `random`.

    Raises:
        ZooError: If an argument is out of range.

    References:
        Wu et al., arXiv 2310.01812; official code github.com/xjwu1024/PPT (Apache-2.0, derived from
        ToMe; this implementation is written from a specification, not from that code).
    """

    card = Card(
        title="PPT: Token Pruning and Pooling for Efficient Vision Transformers",
        authors="Wu et al.",
        venue="arXiv",
        year=2023,
        arxiv="2310.01812",
        code="https://github.com/xjwu1024/PPT",
        licence="Apache-2.0",
        kind="prune or merge",
        training="none (fine-tuning optional)",
        note="The threshold was chosen for DeiT-S at 196 patches; other models need their own.",
    )
    site = "mid"
    compares = "key"
    # Half of the tokens at three stages is not enough for the smaller budgets.
    family = "geometric"

    def __init__(
        self,
        threshold: float = 7e-5,
        patches: int | None = 196,
        prop_attn: bool = True,
        score_from: str = "class",
        score: str | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(score_from, score, seed)
        self.threshold = number("threshold", threshold, 0)
        self.patches = count("patches", patches, null=True)
        self.prop_attn = boolean("prop_attn", prop_attn)
        self.needs |= {"k", "v"}

    def max_drop(self, n: int) -> int:
        return n // 2

    def threshold_at(self, grid: tuple[int, int]) -> float:
        """Threshold for a patch grid."""
        scale = 1.0 if self.patches is None else self.patches / (grid[0] * grid[1])
        return self.threshold * scale**2

    def score(self, t: Tokens, s: Signals, step: Step) -> Tensor:
        value = s.need("v")[:, :, t.prefix :]
        return significance(super().score(t, s, step), value, live_tokens(t))

    @torch.no_grad()
    def assign(self, t: Tokens, s: Signals, step: Step) -> Merge:
        score, threshold = self.score(t, s, step), self.threshold_at(step.grid)
        match = bipartite_matching(self.alike(t, s, step), t.n - step.keep, t.prefix)
        return prune_or_pool(score, threshold, match, plain=not self.prop_attn)

    def joins(self, t: Tokens, s: Signals, step: Step, d: Decision) -> Merge:
        score, threshold = self.score(t, s, step).detach(), self.threshold_at(step.grid)
        return prune_uneven(t, score, threshold, d, plain=not self.prop_attn)

    def macs(self, n: int, prefix: int, step: Step, dims: Dims) -> int:
        senders, receivers = split_sizes(n, prefix)
        return senders * receivers * dims.head_dim
