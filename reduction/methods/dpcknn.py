"""DPC-KNN: density peaks become cluster centres."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from reduction.assignment import Merge
from reduction.base import Card, Reducer
from reduction.checks import boolean, count, number
from reduction.counts import Dims, Spec, Step
from reduction.functional.clustering import group_exp
from reduction.functional.density import density_peaks
from reduction.mixins.learned import Staged
from reduction.registry import register
from reduction.tokens import Signals, Tokens


@register("dpcknn")
class DPCKNN(Staged, Reducer):
    """Average the tokens of each cluster, weighted by a learned score.

    Before the block: density from the k nearest tokens, centres where density times distance to
    the next denser token is largest, nearest-centre clusters, and `sum(w x) / (sum(w) + 1e-6)`
    with `w = exp(score(x))`. The clustering has no gradient; the weights have.

    The official port adds noise of up to 1e-6 to the densities even in evaluation, so that its
    output may change from run to run; here noise is added in training only.

    Args:
        neighbors: k of the density.
        equal_weight: Plain means without learned scores: nothing to train.
        noise: Size of the noise in training.

    Raises:
        ZooError: If `neighbors` is below 1.

    References:
        Zeng et al. (TCFormer), CVPR 2022, arXiv 2204.08680; official code
        github.com/zengwang430521/TCFormer. Formulas as in github.com/JoakimHaurum/TokenReduction
        (MIT), which drops TCFormer's token convolution and score bias.
    """

    card = Card(
        title="Not All Tokens Are Equal: Human-centric Visual Analysis via Token Clustering "
        "Transformer",
        authors="Zeng et al.",
        venue="CVPR",
        year=2022,
        arxiv="2204.08680",
        code="https://github.com/JoakimHaurum/TokenReduction",
        licence="MIT",
        kind="cluster",
        training="scores, with the backbone (none with equal_weight)",
    )
    site = "pre"
    # As in the code that combines DPC-KNN with CLCA.
    added_tokens = "spare"

    def __init__(self, neighbors: int = 5, equal_weight: bool = False, noise: float = 1e-6) -> None:
        super().__init__()
        self.neighbors = count("neighbors", neighbors)
        self.equal_weight = boolean("equal_weight", equal_weight)
        self.noise = number("noise", noise, 0)

    def build(self, spec: Spec, step: Step) -> nn.Module:
        return nn.ModuleDict({} if self.equal_weight else {"score": nn.Linear(spec.width, 1)})

    def assign(self, t: Tokens, s: Signals, step: Step) -> Merge:
        noise = self.noise if self.training else 0.0
        centres, slot = density_peaks(t.patches.detach(), step.keep, self.neighbors, noise)
        if self.equal_weight:
            weight = torch.ones_like(slot, dtype=t.size.dtype)
        else:
            score = cast(nn.ModuleDict, self.stage(step))["score"](t.patches).squeeze(-1).float()
            # A score grows with the length of the features, which nothing bounds.
            weight, _ = group_exp(score, slot, step.keep)
        total = weight.new_zeros(centres.shape).scatter_add(1, slot, weight)
        coef = weight / (total.gather(1, slot) + 1e-6)
        return Merge(slot, centres, coef=coef)

    def macs(self, n: int, prefix: int, step: Step, dims: Dims) -> int:
        return n * n * dims.width + (0 if self.equal_weight else n * dims.width)
