"""Methods that choose patches before the first block, by looking at the images."""

from __future__ import annotations

from torch import Tensor

from reduction.assignment import Keep
from reduction.counts import Step


class AtInput:
    """A method of the site "input": it acts once, between the embedding and the first block.

    Positions are added before patches are taken away, so they stay those of the full grid.
    `Reducer.count`, `max_drop` and `macs` are asked for this one reduction, with a step of block 0.
    """

    def look(self, images: Tensor, grid: tuple[int, int], step: Step) -> Keep:
        """Choose patches.

        Args:
            images: What the model was given, `(B, 3, H, W)`.
            grid: Patch grid `(rows, columns)`; patches are numbered row by row.
            step: Budget.

        Returns:
            The patches that stay, `(B, K)`; with `valid` where images keep different numbers.
        """
        raise NotImplementedError(f"{type(self).__name__} must override look")
