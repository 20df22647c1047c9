"""ToMe: merge the most similar pairs of tokens in every block."""

from __future__ import annotations

from reduction.assignment import Merge
from reduction.base import Card, Reducer
from reduction.checks import boolean, one_of
from reduction.counts import Dims, Step
from reduction.functional.matching import bipartite_matching, head_sum, split_sizes
from reduction.methods.dtome import DToMe
from reduction.mixins.calibrating import TakesThresholds
from reduction.registry import register
from reduction.tokens import Signals, Tokens

METRICS = ("key", "feature")


@register("tome")
class ToMe(TakesThresholds, Reducer):
    """Token Merging.

    Between attention and MLP, tokens alternate between two sets; each of the first set is matched
    with the most similar of the second, and the r best pairs merge into their size-weighted mean.
    Sizes are carried on and enter the next attention as log(size).

    Args:
        metric: What is compared by cosine: "key" (mean over heads of the keys, after key
            normalisation where the model has one; the paper's choice) or "feature" (the residual
            stream).
        prop_attn: Proportional attention. The official README turns it off for MAE models that
            were not trained with merging.

    Raises:
        ZooError: If `metric` is unknown.

    References:
        Bolya et al., ICLR 2023, arXiv 2210.09461; official code github.com/facebookresearch/ToMe
        (CC-BY-NC 4.0; this implementation is written from a specification, not from that code).
    """

    card = Card(
        title="Token Merging: Your ViT But Faster",
        authors="Bolya et al.",
        venue="ICLR",
        year=2023,
        arxiv="2210.09461",
        code="https://github.com/facebookresearch/ToMe",
        licence="CC-BY-NC 4.0",
        kind="merge",
        training="none",
    )
    site = "mid"
    family = "constant_r"

    def __init__(self, metric: str = "key", prop_attn: bool = True) -> None:
        super().__init__()
        self.metric = one_of("metric", metric, METRICS)
        self.prop_attn = boolean("prop_attn", prop_attn)
        self.needs = frozenset({"k"}) if metric == "key" else frozenset()

    def thresholded(self) -> DToMe:
        return DToMe(prop_attn=self.prop_attn, metric=self.metric)

    def max_drop(self, n: int) -> int:
        return n // 2

    def assign(self, t: Tokens, s: Signals, step: Step) -> Merge:
        metric = t.patches
        if self.metric == "key":
            metric = head_sum(s.need("k")[:, :, t.prefix :].detach())
        match = bipartite_matching(metric, t.n - step.keep, t.prefix)
        return Merge(None, match.leader, pairs=(match.source, match.target))

    def macs(self, n: int, prefix: int, step: Step, dims: Dims) -> int:
        senders, receivers = split_sizes(n, prefix)
        return senders * receivers * (dims.head_dim if self.metric == "key" else dims.width)
