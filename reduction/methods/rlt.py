"""RLT: of a stack of frames, drop the patches that have not changed since the frame before."""

from __future__ import annotations

import torch
from torch import Tensor

from reduction.assignment import Keep
from reduction.base import Card, Reducer
from reduction.checks import count, number
from reduction.counts import Step
from reduction.errors import ZooError
from reduction.functional.frames import Runs, static_runs
from reduction.functional.predicting import patch_vectors
from reduction.functional.thresholds import held
from reduction.mixins.adaptive import Adaptive
from reduction.mixins.entry import AtInput
from reduction.registry import register


@register("rlt")
class RLT(Adaptive, AtInput, Reducer):
    """Run-Length Tokenization, for frames that lie on top of each other in one tall image.

    Before the first block, a patch stays if its mean pixel distance to the patch at its place in
    the frame before is above the threshold; the first frame stays whole. A dropped patch is held by
    the last one that stayed at its place, whose size is the length of the run.

    A stack is one image of `frames * height` rows, so the tokens are numbered by time, row and
    column, as those of a video transformer. For clips `(B, 3, T, H, W)` and tubes of frames there
    are `reduction.functional.frames.static_runs` and `tubes`. The stacking is ours.

    Args:
        frames: How many lie on top of each other; 1 keeps everything.
        threshold: Mean distance of pixels, as the model is given them.

    Raises:
        ZooError: If an argument is out of range.

    References:
        Choudhury et al., NeurIPS 2024, arXiv 2411.05222; official code
        github.com/rccchoudhury/rlt (MIT).
    """

    card = Card(
        title="Don't Look Twice: Faster Video Transformers with Run-Length Tokenization",
        authors="Choudhury et al.",
        venue="NeurIPS",
        year=2024,
        arxiv="2411.05222",
        code="https://github.com/rccchoudhury/rlt",
        licence="MIT",
        kind="prune before block 0",
        training="none (fine-tuning recommended)",
        note="For stacks of frames; one image has nothing to drop. No embedding of run lengths.",
    )
    site = "input"
    family = "constant_r"
    every_block = True
    limited = False

    def __init__(self, frames: int = 1, threshold: float = 0.1) -> None:
        super().__init__()
        self.frames = count("frames", frames)
        self.threshold = number("threshold", threshold)

    def count(self, n: int, step: Step) -> int:
        """As many as there are: pixels decide."""
        return n

    def find(self, images: Tensor, grid: tuple[int, int]) -> Runs:
        """What is kept of stacks `(B, 3, frames * H, W)`.

        Raises:
            ZooError: If the rows of patches are not those of whole frames.
        """
        x = patch_vectors(images, frame_grid(grid, self.frames))
        x = x.reshape(x.shape[0], self.frames, -1, x.shape[3])
        return static_runs(x, x, self.threshold)

    @torch.no_grad()
    def look(self, images: Tensor, grid: tuple[int, int], step: Step) -> Keep:
        return held(self.find(images, grid).source)


def frame_grid(grid: tuple[int, int], frames: int) -> tuple[int, int]:
    """The same grid, once it is clear that it holds whole frames.

    Raises:
        ZooError: If it does not.
    """
    if grid[0] % frames:
        raise ZooError(
            f"expected {frames} frames on top of each other, whose rows of patches divide, got "
            f"{grid[0]} rows; set frames, or build the model with img_size=(frames * height, width)"
        )
    return grid
