"""Training one model for many compressed grids."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from zoo.errors import ZooError

Grid = tuple[int, int]


class MultiGrid(Callback):
    """Draw the compressed grid of every optimiser step at random, uniformly.

    The draw depends on the seed and the number of the step and nothing else: all processes of a
    distributed run draw the same, a resumed run goes on as an uninterrupted one would have, and
    other random numbers stay as they are. Between steps, for validation and in checkpoints, the
    model has the grid that it was built with.

    Args:
        grids: Numbers (square grids) or pairs `[rows, columns]` to draw from; None is every square
            one from 3x3 to 10x10 that the patch grid can hold.
        seed: Of the run.

    Raises:
        ZooError: There is no grid to draw from, or the model's tokens have no compressed grid.
    """

    def __init__(self, grids: Sequence[Any] | None = None, seed: int = 0) -> None:
        if grids is not None and not grids:
            raise ZooError("grids is empty; give sizes such as [3, 5, 7], or null for 3x3 to 10x10")
        self.grids = None if grids is None else [_pair(grid) for grid in grids]
        self.seed = seed
        self._choices: list[Grid] = []
        self._own: Grid = (0, 0)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remember the model's own grid and check the others."""
        model = _model(pl_module)
        self._own = model.compressed_grid
        size = min(model.patch_embed.grid_size)
        self._choices = self.grids or [(s, s) for s in range(min(3, size), min(10, size) + 1)]
        for grid in self._choices:
            model.set_compressed_grid(grid)  # says in words which one does not fit
        model.set_compressed_grid(self._own)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Give the model the grid of this step; batches accumulated for one step share it."""
        _model(pl_module).set_compressed_grid(self.draw(trainer.global_step))

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Give the model its own grid back."""
        _model(pl_module).set_compressed_grid(self._own)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Give the model its own grid back."""
        if self._choices:
            _model(pl_module).set_compressed_grid(self._own)

    def draw(self, step: int) -> Grid:
        """The grid of an optimiser step."""
        return random.Random(f"{self.seed} {step}").choice(self._choices)


def _model(pl_module: Any) -> Any:
    model = getattr(pl_module.net, "backbone", pl_module.net)
    if not hasattr(model, "set_compressed_grid"):
        raise ZooError(
            f"{type(model).__name__} has no compressed grid to draw; train a LookupViT, e.g. "
            "backbone=lookupvit_digits, or leave out callbacks=multigrid"
        )
    return model


def _pair(grid: Any) -> Grid:
    rows, columns = (grid, grid) if isinstance(grid, int) else grid
    return int(rows), int(columns)
