"""Random: the baseline that every importance score has to beat."""

from __future__ import annotations

import torch
from torch import Tensor

from reduction.assignment import Keep
from reduction.base import Card, Reducer
from reduction.counts import Step
from reduction.functional.lots import draw, lots, seed_or_torchs
from reduction.mixins.images import SeesImages
from reduction.registry import register
from reduction.tokens import Signals, Tokens


@register("random")
class Random(SeesImages, Reducer):
    """Keep tokens drawn at random, without looking at them.

    In evaluation every image gets a draw of its own, which follows from the seed, the block and the
    pixels of the image: it is the same in every batch, and a run can be repeated. In training every
    image gets another draw each time, from torch's generator.

    Args:
        seed: Seed of the evaluation draws; None is torch's own seed (`torch.manual_seed`) at the
            time when the reducer is made, which is the option `seed` on the command line.

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
    drops = True

    def __init__(self, seed: int | None = None) -> None:
        super().__init__()
        # A number in the recipe too, so that a saved model goes on answering as it did.
        self.seed = seed_or_torchs(seed)

    def see(self, images: Tensor, t: Tokens) -> Tokens:
        return t if self.training else t._replace(memory={**t.memory, "lot": lots(images)})

    def assign(self, t: Tokens, s: Signals, step: Step) -> Keep:
        if self.training:
            score = torch.rand(t.x.shape[0], t.n, device=t.x.device)
            return Keep(score.topk(step.keep, dim=1, sorted=False).indices)
        # Called by itself, without images, the tokens stand for them.
        lot = t.memory["lot"] if "lot" in t.memory else lots(t.x)
        return Keep(draw(lot, t.n, step.keep, self.seed, step.block))
