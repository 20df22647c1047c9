"""Dropping fewer and fewer patches while training goes on."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from zoo.errors import ZooError


class PatchDropRamp(Callback):
    """Change the share of dropped patches linearly over the optimiser steps of a run.

    For models with `set_patch_drop`, as Jumbo has. The defaults are those reported for Jumbo on
    ImageNet-21k. The rate follows from the step alone, so a resumed run goes on as it would have.

    Args:
        start: Share dropped at the first step.
        end: Share dropped at the last step.

    Raises:
        ZooError: If a share is not in [0, 1).
    """

    def __init__(self, start: float = 0.9, end: float = 0.1) -> None:
        for name, rate in (("start", start), ("end", end)):
            if not 0 <= rate < 1:
                raise ZooError(f"{name} of the patch drop must be in [0, 1), got {rate}")
        self.start, self.end = start, end

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse a model that cannot drop patches.

        Raises:
            ZooError: With what to type instead.
        """
        if not hasattr(_backbone(pl_module), "set_patch_drop"):
            raise ZooError(
                "callbacks=patch_drop works on a Jumbo; for other ViTs give a fixed rate, "
                "+backbone.args.patch_drop_rate=0.5"
            )

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Set the rate of this step."""
        last = max(1, int(trainer.estimated_stepping_batches) - 1)
        done = min(1.0, trainer.global_step / last)
        _backbone(pl_module).set_patch_drop(self.start + (self.end - self.start) * done)


def _backbone(pl_module: Any) -> Any:
    net = pl_module.net
    return net.unwrap() if hasattr(net, "unwrap") else net
