"""Prune by importance first, then merge by similarity: a hybrid of ours."""

from __future__ import annotations

from torch import Tensor

from reduction.assignment import Assignment, Keep
from reduction.base import Card
from reduction.checks import boolean, one_of, share
from reduction.counts import Dims, Step
from reduction.functional.matching import head_sum
from reduction.functional.settling import join_closest
from reduction.mixins.pairing import RankedPairs
from reduction.registry import register
from reduction.tokens import Signals, Tokens, take_rows

METRICS = ("key", "feature")


@register("importance_then_similarity")
class ImportanceThenSimilarity(RankedPairs):
    """Drop the least attended tokens, then merge less important ones into their likes. Ours.

    Between attention and MLP, tokens are sorted by the class token's attention. Of those that have
    to leave, `prune_share` are dropped from the tail. The survivors are split in the middle: each
    of the less important half looks for the most similar one of the more important half, and the
    closest pairs merge into their size-weighted mean. Sizes enter later attentions as log(size).

    The split follows importance, not position, so no important token is merged away; and of the
    less important ones only those leave that have a close match. All counts are fixed.

    Args:
        prune_share: Share of the leaving tokens that is dropped, where the schedule gives no count
            for pruning. More are dropped where less than half of the survivors would be kept.
        score_from: "class" or "column_mean" (attention received from all tokens, for models
            without a class token).
        metric: What is compared by cosine: "feature" (the residual stream) or "key" (sum over
            heads; cheaper, and worse on digits).
        prop_attn: Proportional attention.
        score: Rank by another score, see `ranked`; None is `score_from`.
        seed: Of the score "random", see `random`.

    Raises:
        ZooError: If an argument is out of range.

    References:
        Ours. The order (importance, then similarity among the less important) is that of Zhan et
        al., "Rethinking Token Reduction for State Space Models", EMNLP 2024, for Mamba language
        models; nothing else is from there.
    """

    card = Card(
        title="Importance, then similarity (ours)",
        authors="TokenZoo",
        venue="ours",
        year=2026,
        arxiv=None,
        code=None,
        licence=None,
        kind="prune + merge",
        training="none",
        note="Ours, not a published method.",
    )
    site = "mid"
    family = "constant_r"
    only = (("prune_share", (0.0,)),)

    def __init__(
        self,
        prune_share: float = 0.3,
        score_from: str = "class",
        metric: str = "feature",
        prop_attn: bool = True,
        score: str | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(score_from, score, seed)
        self.prune_share = share("prune_share", prune_share)
        self.metric = one_of("metric", metric, METRICS)
        self.prop_attn = boolean("prop_attn", prop_attn)
        if metric == "key":
            self.needs |= {"k"}

    def survivors(self, n: int, step: Step) -> int:
        """Tokens left by pruning: at most twice those left in the end, or pairs would run out."""
        keep, left = step.keep, step.budget.prune
        if left is None:
            left = n - round(self.prune_share * (n - keep))
        return max(keep, min(n, left, 2 * keep))

    def order(self, t: Tokens, score: Tensor, step: Step) -> Tensor:
        left = self.survivors(t.n, step)
        return score.topk(left, dim=1, sorted=left > step.keep).indices

    def assign(self, t: Tokens, s: Signals, step: Step) -> Assignment:
        order = self.order(t, self.score(t, s, step).detach(), step)
        if order.shape[1] == step.keep:
            return Keep(order)
        return join_closest(take_rows(self.alike(t, s, step), order), order, step.keep)

    def alike(self, t: Tokens, s: Signals, step: Step) -> Tensor:
        x = t.patches if self.metric == "feature" else head_sum(s.need("k")[:, :, t.prefix :])
        return x.detach()

    def macs(self, n: int, prefix: int, step: Step, dims: Dims) -> int:
        left = self.survivors(n, step)
        if left == step.keep:
            return 0
        width = dims.head_dim if self.metric == "key" else dims.width
        return (left - left // 2) * (left // 2) * width
