"""K-Medoids as the public TokenReduction code has it, for weights that were trained with it."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from reduction.assignment import Keep
from reduction.base import Card, Reducer
from reduction.checks import boolean, count
from reduction.counts import Dims, Spec, Step
from reduction.errors import ZooError
from reduction.functional import clustering
from reduction.functional.lots import seed_or_torchs
from reduction.mixins.learned import Learned
from reduction.registry import register
from reduction.tokens import Signals, Tokens


@register("kmedoids_haurum")
class KMedoidsHaurum(Learned, Reducer):
    """The K-Medoids of Haurum et al.'s comparison, kept as it is.

    It is often taken for Token Pooling, but its update step picks, in each cluster, the member with
    the least `w_i * sum_j d_ij` over *all* tokens j. That favours unimportant tokens and pulls
    every medoid to the middle of the image's tokens, so each iteration undoes part of the good
    start, the tokens with the largest weights. `token_pooling` minimises what it says.

    The output is the medoids' own features; what else was in a cluster is lost, although sizes and
    the source map count it in. A cluster without members takes token 0, so tokens may come twice.

    Args:
        iterations: Always so many (the training script's default).
        equal_weight: All weights one. The first medoid is then drawn at random, the same for the
            whole batch, and each further one is the token with the largest distance to any medoid
            so far.
        seed: Of that draw; None is torch's own seed when the reducer is made, see `random`.

    Raises:
        ZooError: If an argument is out of range.

    References:
        Haurum et al., ICCVW 2023, arXiv 2308.04657; official code
        github.com/JoakimHaurum/TokenReduction (MIT; written from a description of it).
    """

    card = Card(
        title="Which Tokens to Use? Investigating Token Reduction in Vision Transformers",
        authors="Haurum et al.",
        venue="ICCVW",
        year=2023,
        arxiv="2308.04657",
        code="https://github.com/JoakimHaurum/TokenReduction",
        licence="MIT",
        kind="cluster",
        training="fine-tuning recommended",
        note="For importing weights; to reduce tokens well, use token_pooling.",
    )
    site = "pre"
    needs = frozenset({"column"})

    def __init__(
        self, iterations: int = 3, equal_weight: bool = False, seed: int | None = None
    ) -> None:
        super().__init__()
        self.iterations = count("iterations", iterations, what="an integer of at least 1")
        self.equal_weight = boolean("equal_weight", equal_weight)
        self.seed = seed_or_torchs(seed)
        if equal_weight:
            self.needs = frozenset()

    def setup(self, spec: Spec) -> None:
        if self.needs and spec.stages and spec.stages[0].block == 0:
            raise ZooError(
                f"{self.name} weighs tokens by the attention of the block before, so it cannot "
                "reduce in block 0; choose others, e.g. schedule=keep_rate 'schedule.blocks=[3,6]'"
            )

    @torch.no_grad()
    def assign(self, t: Tokens, s: Signals, step: Step) -> Keep:
        """Medoids in the order in which the official code produces them, and the last groups."""
        distance = clustering.squared_distances(t.patches).sqrt()
        weight = None if s.column is None else s.column[:, t.prefix :]
        # The sum is over all tokens, so it never changes.
        cost = distance.sum(2)
        if self.equal_weight:
            medoid = self._far_apart(distance, step)
        else:
            if weight is None:
                raise ZooError(f"{self.name} needs the attention of the block before; see setup")
            cost = cost * weight
            medoid = weight.topk(step.keep, dim=1).indices
        zero = torch.zeros_like(medoid)
        for _ in range(self.iterations):
            medoid = clustering.least_of_cluster(
                cost, clustering.nearest_row(distance, medoid), zero
            )
        return Keep(medoid, slot=clustering.nearest_row(distance, medoid))

    def first(self, n: int, step: Step) -> int:
        """The first of the medoids that start far apart, drawn from the seed."""
        return random.Random(f"{self.seed}/{step.block}/{n}").sample(range(n), 1)[0]

    def _far_apart(self, distance: Tensor, step: Step) -> Tensor:
        return clustering.farthest_reach(distance, self.first(distance.shape[1], step), step.keep)

    def macs(self, n: int, prefix: int, step: Step, dims: Dims) -> int:
        return n * n * dims.width
