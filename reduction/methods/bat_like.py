"""BAT-like: cluster what gets no attention, pair up what does. Built from a description."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from reduction.assignment import Merge
from reduction.base import Card
from reduction.checks import count, share
from reduction.counts import Dims, Step
from reduction.functional.clustering import mean_shares
from reduction.functional.density import pairs_and_clusters
from reduction.functional.matching import split_sizes
from reduction.mixins.ranking import ScoreReducer
from reduction.registry import register
from reduction.tokens import Tokens


@register("bat_like")
class BatLike(ScoreReducer):
    """Keep attentive tokens and merge twins among them; cluster the others. From a description.

    Between attention and MLP, patches are split by the class token's attention. Of the attentive
    ones the most similar pairs merge; the inattentive ones are clustered around density peaks.
    A group becomes the mean of its members weighted by their attention. So the result holds both
    what matters and a sample of everything else.

    The abstract and a figure of "Beyond Attentive Tokens" (BAT) say that much. How many clusters
    and pairs it uses at each keep rate is not published and does not follow from its logs. The
    counts, the density's formula and the weights are ours: results are not BAT's.

    Args:
        attentive_share: Share of the kept tokens that come from the attentive ones, before twins
            merge (ours). At least one token always stands for the inattentive ones.
        pair_share: Twins that merge, as a share of the attentive tokens, at most half (ours). Each
            leaves room for one more cluster.
        neighbors: Neighbours that the density looks at (ours).
        score_from: "class" (the paper's) or "column_mean" (attention received from all tokens;
            ours, for models without a class token).
        score: Rank by another score, see `ranked`; None is `score_from`.
        seed: Of the score "random", see `random`.

    Raises:
        ZooError: If an argument is out of range.

    References:
        After Long et al., CVPR 2023, arXiv 2211.11315, whose code was not released.
    """

    card = Card(
        title="Beyond Attentive Tokens: Incorporating Token Importance and Diversity for "
        "Efficient Vision Transformers",
        authors="Long et al.",
        venue="CVPR",
        year=2023,
        arxiv="2211.11315",
        code=None,
        licence=None,
        kind="merge + cluster",
        training="none; the paper fine-tunes",
        note="Built from a description of BAT, whose code is not public; counts are ours, and it "
        "is compared with no reference.",
    )
    site = "mid"
    no_thresholds = "its pairs and clusters are so many by rule"

    def __init__(
        self,
        attentive_share: float = 0.7,
        pair_share: float = 0.2,
        neighbors: int = 5,
        score_from: str = "class",
        score: str | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(score_from, score, seed)
        self.attentive_share = share("attentive_share", attentive_share)
        self.pair_share = share("pair_share", pair_share, most=0.5)
        self.neighbors = count("neighbors", neighbors)

    def split(self, n: int, keep: int) -> tuple[int, int, int]:
        """Attentive tokens, pairs that merge among them, and clusters of the others.

        Args:
            n: Tokens entering.
            keep: Tokens leaving: attentive - pairs + clusters.
        """
        attentive = min(math.ceil(self.attentive_share * keep), keep - 1)
        pairs = min(int(self.pair_share * attentive), n - keep)
        return attentive, pairs, keep - attentive + pairs

    def order(self, t: Tokens, score: Tensor, step: Step) -> Tensor:
        return score.argsort(dim=1, descending=True)

    def settle(self, t: Tokens, kept: Tensor, rest: Tensor, score: Tensor, step: Step) -> Merge:
        attentive, pairs, clusters = self.split(t.n, step.keep)
        order = torch.cat([kept, rest], dim=1)
        x, sizes = t.patches, (attentive, pairs, clusters)
        slot, leader = pairs_and_clusters(x, order, *sizes, self.neighbors)
        weight = score.to(torch.promote_types(score.dtype, torch.float32)).clamp_min(1e-12)
        return Merge(slot, leader, coef=mean_shares(weight, slot, leader.shape[1]))

    def macs(self, n: int, prefix: int, step: Step, dims: Dims) -> int:
        attentive, pairs, _ = self.split(n, step.keep)
        senders, receivers = split_sizes(attentive, 0) if pairs else (0, 0)
        return ((n - attentive) ** 2 + senders * receivers) * dims.width
