"""HiPrune: patches on objects, their neighbours, and what a deep block attends to."""

from __future__ import annotations

import torch
from torch import Tensor

from reduction.base import Card
from reduction.checks import count, share
from reduction.selection.base import Compat, Selection, Selector, choose, whole_number
from reduction.selection.given import Given
from reduction.selection.ranking import first, marked, top
from reduction.selection.registry import register_selector


@register_selector("hiprune")
class HiPrune(Selector):
    """Anchors of a middle block with the patches beside them, filled up by a deep block.

    Reads what patches receive from all tokens, so a class token is not needed.

    Args:
        alpha: Share of the tokens that anchors and their neighbours make up.
        object_layer: Block of the anchors, counted from 1 in a tower of 24; others in proportion.
        compat: "official": the left and right neighbours of a patch at the border of the image are
            patches of the row above and below, and those beyond the corners are the corners.

    Raises:
        ZooError: If an argument is out of range.

    References:
        Liu et al., arXiv 2508.00553; official code github.com/Danielement321/HiPrune (MIT).
    """

    card = Card(
        title="HiPrune: Training-Free Visual Token Pruning via Hierarchical Attention in "
        "Vision-Language Models",
        authors="Liu et al.",
        venue="arXiv",
        year=2025,
        arxiv="2508.00553",
        code="https://github.com/Danielement321/HiPrune",
        licence="MIT",
        kind="attention",
        training="none",
    )
    reads = ("column",)
    raster = True

    def __init__(
        self, alpha: float = 0.1, object_layer: int = 9, compat: Compat | None = None
    ) -> None:
        super().__init__(compat)
        self.alpha = share("alpha", alpha)
        self.object_layer = count("object_layer", object_layer)

    def shallow_block(self, depth: int) -> int:
        """See `Selector`."""
        return round(self.object_layer / 24 * depth) - 1

    def pick(self, given: Given, keep: int | None) -> Selection:
        """See `Selector`."""
        k = whole_number(keep, "hiprune")
        grid = given.raster("hiprune")
        given.need("column", "hiprune"), given.need("column_shallow", "hiprune")
        anchors = min(round(k * self.alpha / 5), given.n)  # half to even
        deep = given.per_row("column")
        near = torch.zeros_like(deep, dtype=torch.bool)
        if anchors:
            index = top(given.per_row("column_shallow"), anchors)
            near = (_folded if self.official else _beside)(index, given.n, grid[1])
        return choose(given, first(near, deep, k))


def _beside(index: Tensor, n: int, width: int) -> Tensor:
    """Mask of the patches at `index` and of those that touch them on the image."""
    column = index % width
    moves = {
        0: torch.ones_like(index, dtype=torch.bool),
        -1: column > 0,
        1: column < width - 1,
        -width: index >= width,
        width: index < n - width,
    }
    near = [torch.where(inside, index + move, index) for move, inside in moves.items()]
    return marked(torch.cat(near, 1), n)


def _folded(index: Tensor, n: int, width: int) -> Tensor:
    """The same on the row-major sequence: over the border of a row, and back at both ends."""
    near = [index + move for move in (0, -1, 1, -width, width)]
    return marked(torch.cat(near, 1).clamp(0, n - 1), n)
