"""PixelPrune: drop the patches whose pixels follow from their neighbours'."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from reduction.assignment import Keep
from reduction.base import Card, Reducer
from reduction.checks import boolean, number, one_of
from reduction.counts import Step
from reduction.functional.predicting import Predicted, patch_vectors, predicted_2d, runs
from reduction.functional.thresholds import held
from reduction.mixins.adaptive import Adaptive
from reduction.mixins.entry import AtInput
from reduction.mixins.pixels import Pixels
from reduction.registry import register

SCANS = ("pred_2d", "raster", "serpentine")
METRICS = ("exact", "max", "mae", "rmse")


@register("pixelprune")
class PixelPrune(Adaptive, Pixels, AtInput, Reducer):
    """Before the first block, keep only the patches that their neighbours do not predict.

    Pixels are compared as they are in the picture, from 0 to 1. Positions stay those of the full
    grid. A dropped patch is held by the one that it follows from: that one's size counts it.

    Args:
        scan: "pred_2d": the left or the upper neighbour predicts, as an edge runs; "raster":
            patches like the first of a run along the rows leave; "serpentine": likewise, every
            second row backwards.
        metric: Distance of two patches: "max", "mae", "rmse" of their pixels; "exact" is "max" at
            a threshold of 0.
        threshold: Patches up to this far apart are alike.
        anchored: Later comparisons see what predicted a dropped patch, so that errors do not add
            up; otherwise they see true pixels. Of "pred_2d".
        mean: What was subtracted from pixels, a number or one per channel; None is what the
            backbone publishes, or 0.5.
        std: What they were divided by, likewise.

    Raises:
        ZooError: If an argument is unknown or out of range.

    References:
        Wang et al., arXiv 2604.00886; official code github.com/OPPO-Mente-Lab/PixelPrune
        (Apache-2.0).
    """

    card = Card(
        title="PixelPrune: Pixel-Level Adaptive Visual Token Reduction via Predictive Coding",
        authors="Wang et al.",
        venue="arXiv",
        year=2026,
        arxiv="2604.00886",
        code="https://github.com/OPPO-Mente-Lab/PixelPrune",
        licence="Apache-2.0",
        kind="prune before block 0",
        training="none",
        note="For documents and screens: of a photograph nearly all patches stay at threshold 0.",
    )
    site = "input"
    family = "constant_r"
    every_block = True
    limited = False

    def __init__(
        self,
        scan: str = "pred_2d",
        metric: str = "max",
        threshold: float = 0.0,
        anchored: bool = True,
        mean: float | Sequence[float] | None = None,
        std: float | Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.scan = one_of("scan", scan, SCANS)
        self.metric = one_of("metric", metric, METRICS)
        self.threshold = number("threshold", threshold, 0)
        self.anchored = boolean("anchored", anchored)
        self.normalised_by(mean, std)

    def count(self, n: int, step: Step) -> int:
        """As many as there are: pixels decide."""
        return n

    def find(self, images: Tensor, grid: tuple[int, int]) -> Predicted:
        """What is kept of images `(B, 3, H, W)` as the model is given them."""
        x = patch_vectors(self.pixels(images), grid)
        metric, threshold = self.metric, self.threshold
        if metric == "exact":
            metric, threshold = "max", 0.0
        if self.scan != "pred_2d":
            return runs(x, metric, threshold, self.scan == "serpentine")
        # At a threshold of zero what predicts a patch is the patch, and both forms are one.
        return predicted_2d(x, metric, threshold, self.anchored and threshold > 0)

    @torch.no_grad()
    def look(self, images: Tensor, grid: tuple[int, int], step: Step) -> Keep:
        return held(self.find(images, grid).source)
