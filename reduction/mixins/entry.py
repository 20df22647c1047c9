"""Methods that choose patches before the first block, by looking at the images."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from reduction.assignment import Keep
from reduction.counts import Step
from reduction.tokens import Tokens


class AtInput:
    """A method of the site "input": it acts once, between the embedding and the first block.

    Positions are added before patches are taken away, so they stay those of the full grid.
    `Reducer.count`, `max_drop` and `macs` are asked for this one reduction, with a step of block 0,
    which has the budget of the first block that the schedule reduces in.
    """

    def look(self, images: Tensor, grid: tuple[int, int], step: Step) -> Keep:
        """Choose patches.

        Args:
            images: The pixels of all patches, `(B, 3, H, W)`: what the model was given, without a
                margin that is in no patch.
            grid: Patch grid `(rows, columns)`; patches are numbered row by row.
            step: Budget.

        Returns:
            The patches that stay, `(B, K)`; with `valid` where images keep different numbers.
        """
        raise NotImplementedError(f"{type(self).__name__} must override look")


class Embedding(NamedTuple):
    """How a backbone makes tokens of images, in pieces.

    Attributes:
        patches: Images `(B, 3, H, W)` of any size that patches divide to patches without a
            position, `(B, N, C)`.
        positions: Rows and columns to positions of such a grid, `(1, N, C)`.
    """

    patches: Callable[[Tensor], Tensor]
    positions: Callable[[tuple[int, int]], Tensor]


class AtEmbedding(AtInput):
    """A method of the site "input" that makes tokens of its own, of several patches each."""

    def enter(
        self, t: Tokens, images: Tensor, grid: tuple[int, int], step: Step, embedding: Embedding
    ) -> Tokens:
        """Tokens that enter the first block.

        Args:
            t: All patches as the backbone embeds them, positions included.
            images: As in `look`.
            grid: Patch grid `(rows, columns)`.
            step: Budget.
            embedding: How further tokens are made.
        """
        raise NotImplementedError(f"{type(self).__name__} must override enter")
