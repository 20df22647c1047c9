"""Token Pooling: replace the tokens by the centres of a clustering."""

from __future__ import annotations

import torch
from torch import Tensor

from reduction.assignment import Assignment, Keep, Merge
from reduction.base import Card, Reducer
from reduction.checks import boolean, count, one_of
from reduction.counts import Dims, Step
from reduction.functional.clustering import (
    Clusters,
    heaviest,
    kmeans,
    kmedoids,
    mean_shares,
    spread,
    squared_distances,
)
from reduction.registry import register
from reduction.tokens import Signals, Tokens

CENTRES = ("mean", "medoid")
ALGORITHMS = ("kmedoids", "kmeans")
SCORES = {"column_mean": "column", "class": "cls_row", "key_norm": "k", "none": None}


@register("token_pooling")
class TokenPooling(Reducer):
    """Token Pooling.

    Behind a block, tokens `f_i` with weights `w_i` are clustered so that the weighted
    reconstruction error `sum_i w_i min_k |f_i - c_k|^2` is small, and each cluster becomes one
    token: its weighted mean or its medoid. The weight does not select tokens; it says which have to
    be approximated well. There is nothing to learn, and no gradient flows through the clustering.

    The last block is left alone: nothing but the final norm and the head comes after it.

    Args:
        algorithm: "kmedoids" (centres are tokens, one distance matrix serves all iterations; the
            paper's best trade) or "kmeans" (free centres, new distances in every iteration).
        centre: What stands for a cluster: "mean", weighted by the score, or "medoid", the token
            in its middle.
        score_from: The weights: "column_mean" (attention a token receives from all heads and
            queries of the block, the paper's), "class" (attention of the class token), "key_norm"
            (length of the keys) or "none" (all equal).
        iterations: At most so many; the paper finds five enough.
        prop_attn: Add log(size) to the logits of later attentions, as ToMe does. Not the paper's.

    Raises:
        ZooError: If an argument is unknown or out of range.

    References:
        Marin et al., WACV 2023, arXiv 2110.03860. No official code exists.
    """

    card = Card(
        title="Token Pooling in Vision Transformers for Image Classification",
        authors="Marin et al.",
        venue="WACV",
        year=2023,
        arxiv="2110.03860",
        code=None,
        licence=None,
        kind="cluster",
        training="fine-tuning recommended",
        note="No official code exists; what the paper leaves open is listed on its page.",
    )
    site = "post"
    family = "geometric"

    def __init__(
        self,
        algorithm: str = "kmedoids",
        centre: str = "mean",
        score_from: str = "column_mean",
        iterations: int = 5,
        prop_attn: bool = False,
    ) -> None:
        super().__init__()
        self.algorithm = one_of("algorithm", algorithm, ALGORITHMS)
        self.centre = one_of("centre", centre, CENTRES)
        self.score_from = one_of("score_from", score_from, SCORES)
        self.iterations = count("iterations", iterations, what="an integer of at least 1")
        self.prop_attn = boolean("prop_attn", prop_attn)
        signal = SCORES[score_from]
        self.needs = frozenset() if signal is None else frozenset({signal})

    def acts(self, block: int, depth: int) -> bool:
        return block < depth - 1

    @torch.no_grad()
    def weight(self, s: Signals, prefix: int) -> Tensor | None:
        """What an error in each token costs, `(B, N)`, positive with mean one; None: all equal."""
        if self.score_from == "column_mean":
            score = s.need("column")[:, prefix:].float()
        elif self.score_from == "class":
            score = s.need("cls_row")[:, :, prefix:].float().mean(1)
        elif self.score_from == "key_norm":
            score = s.need("k")[:, :, prefix:].float().norm(dim=-1).mean(1)
        else:
            return None
        score = score / score.mean(1, keepdim=True).clamp_min(torch.finfo(score.dtype).tiny)
        # A score may round to zero; a cluster of such tokens still needs a mean.
        return score.clamp_min(1e-6)

    @torch.no_grad()
    def cluster(self, x: Tensor, weight: Tensor | None, k: int) -> Clusters:
        """Cluster tokens `(B, N, C)` into k groups."""
        if self.algorithm == "kmeans":
            first = spread(squared_distances(x), k) if weight is None else heaviest(weight, k)
            return kmeans(x, first, weight, self.iterations)
        distance = squared_distances(x)
        first = spread(distance, k) if weight is None else heaviest(weight, k)
        return kmedoids(distance, first, weight, self.iterations)

    def assign(self, t: Tokens, s: Signals, step: Step) -> Assignment:
        weight = self.weight(s, t.prefix)
        found = self.cluster(t.patches, weight, step.keep)
        if self.centre == "medoid":
            return Keep(found.leader, slot=found.slot)
        if weight is None:
            weight = torch.ones_like(found.slot, dtype=torch.float32)
        coef = mean_shares(weight, found.slot, step.keep)
        return Merge(found.slot, found.leader, coef=coef)

    def macs(self, n: int, prefix: int, step: Step, dims: Dims) -> int:
        distances = n * n * dims.width
        if self.algorithm == "kmedoids":
            return distances
        seeding = distances if self.score_from == "none" else 0
        return seeding + self.iterations * n * step.keep * dims.width
