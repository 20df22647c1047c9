"""Random: the baseline that every importance score has to beat."""

from __future__ import annotations

import random as _random

import torch

from reduction.assignment import Keep
from reduction.base import Card, Reducer
from reduction.counts import Step
from reduction.registry import register
from reduction.tokens import Signals, Tokens


@register("random")
class Random(Reducer):
    """Keep tokens drawn at random, without looking at them.

    In evaluation the draw depends on the seed, the block and the counts only: all images keep the
    same tokens, and a run can be repeated. In training every image gets its own draw.

    Args:
        seed: Seed of the evaluation draw.

    References:
        No paper of its own; a control in most, e.g. arXiv 2308.04657.
    """

    card = Card(
        title="Random token dropping (control)",
        authors="folklore",
        venue="none",
        year=2021,
        arxiv=None,
        code=None,
        licence=None,
        kind="prune",
        training="none",
        note="A control, not a method.",
    )
    site = "mid"

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.seed = seed

    def assign(self, t: Tokens, s: Signals, step: Step) -> Keep:
        if self.training:
            score = torch.rand(t.x.shape[0], t.n, device=t.x.device)
            return Keep(score.topk(step.keep, dim=1, sorted=False).indices)
        draw = _random.Random(f"{self.seed}/{step.block}/{t.n}").sample(range(t.n), step.keep)
        return Keep(torch.tensor(sorted(draw), device=t.x.device))
