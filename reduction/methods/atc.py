"""ATC: agglomerative clustering of the tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from reduction.assignment import Merge
from reduction.base import Card
from reduction.checks import boolean, one_of
from reduction.counts import Dims, Step
from reduction.functional.agglomerative import (
    LINKAGES,
    agglomerate,
    clusters_of,
    cosine_distances,
    linked,
)
from reduction.functional.clustering import mean_shares
from reduction.functional.joining import Decision, Partners
from reduction.functional.matching import head_sum
from reduction.functional.settling import plain_mean
from reduction.mixins.calibrating import Calibrates
from reduction.mixins.pairing import Pairs
from reduction.registry import register
from reduction.tokens import Signals, Tokens

MEANS = ("size", "plain")


@register("atc")
class ATC(Pairs):
    """Agglomerative Token Clustering.

    Between attention and MLP, every token starts as a cluster, and the two closest clusters are
    joined until `keep` are left. Closeness is one minus the cosine of the keys, averaged over
    heads; between clusters it is the mean ("average"), the largest ("complete") or the smallest
    ("single") over all pairs of members. A cluster becomes its size-weighted mean. Unlike matching
    in pairs this has no cap of one half, and the order of tokens cannot matter.

    Args:
        linkage: "average" (default of the official code), "complete" (what its README trains) or
            "single".
        prop_attn: Proportional attention.
        mean: "size" weighs tokens by their sizes. "plain" weighs all alike, as the official
            stage-wise code does where proportional attention is off.

    Raises:
        ZooError: If the linkage or the mean is unknown.

    References:
        Haurum et al., ECCV 2024, arXiv 2409.11923; official code github.com/JoakimHaurum/ATC (MIT,
        parts under other terms; this implementation is written from a specification).
    """

    card = Card(
        title="Agglomerative Token Clustering",
        authors="Haurum et al.",
        venue="ECCV",
        year=2024,
        arxiv="2409.11923",
        code="https://github.com/JoakimHaurum/ATC",
        licence="MIT",
        kind="cluster",
        training="none (fine-tuning recommended)",
        note="One sequential step per removed token: cheap in products, not in time.",
    )
    site = "mid"
    needs = frozenset({"k"})
    capped = False

    def __init__(
        self, linkage: str = "average", prop_attn: bool = True, mean: str = "size"
    ) -> None:
        super().__init__()
        self.linkage = one_of("linkage", linkage, LINKAGES)
        self.prop_attn = boolean("prop_attn", prop_attn)
        self.mean = one_of("mean", mean, MEANS)

    def assign(self, t: Tokens, s: Signals, step: Step) -> Merge:
        distance = self.distances(t, s)
        slot, leader = agglomerate(distance, step.keep, self.linkage)
        coef: Tensor | None = None
        if self.mean == "plain":
            coef = mean_shares(torch.ones_like(t.patch_size), slot, step.keep)
        return Merge(slot, leader, coef=coef)

    def distances(self, t: Tokens, s: Signals) -> Tensor:
        """One minus the cosine of the keys of all pairs, `(B, N, N)`."""
        return cosine_distances(head_sum(s.need("k")[:, :, t.prefix :].detach()))

    def partners(self, t: Tokens, s: Signals, step: Step) -> Partners:
        least = None  # as far as it takes
        if isinstance(self, Calibrates) and self.calibrating is None and not self.limit:
            assert self.thresholds is not None
            least = self.thresholds[step.block]
        return linked(t, self.distances(t, s), self.linkage, least)

    def joins(self, t: Tokens, s: Signals, step: Step, d: Decision) -> Merge:
        a = clusters_of(t, d)
        return a if self.mean == "size" else plain_mean(a, t.size.dtype)

    def macs(self, n: int, prefix: int, step: Step, dims: Dims) -> int:
        return n * n * dims.head_dim
