"""Runs Lightning's `fit`, says how to go on where it was stopped, picks the weights it leaves."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_only

if TYPE_CHECKING:
    from zoo.data.module import ImageData
    from zoo.lit.classifier import Classifier


def fit(trainer: pl.Trainer, module: Classifier, data: ImageData, ckpt: str | None) -> float:
    """Trains, and returns the seconds that it took.

    Raises:
        KeyboardInterrupt: It was stopped; how to go on has been said.
    """
    started = time.monotonic()
    try:
        trainer.fit(module, datamodule=data, ckpt_path=ckpt, weights_only=True)
    except SystemExit:
        # Lightning ends the process on Ctrl-C after closing its loggers.
        if not trainer.interrupted:
            raise
        last = checkpoint_of(trainer, "last")
        where = f"go on with the same command and ckpt={last}" if last else "no epoch was complete"
        say(f"\nstopped in epoch {trainer.current_epoch}; {where}")
        raise KeyboardInterrupt from None
    return time.monotonic() - started


def checkpoint_of(trainer: pl.Trainer, which: str) -> str | None:
    """Path of the last or the best checkpoint of this run, if there is one."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if not isinstance(callback, ModelCheckpoint):
            continue
        path = callback.best_model_path
        if (which == "last") != (callback.monitor is None) or not path:
            continue
        # The second is for a resumed run whose folder has been moved since.
        for found in (path, os.path.join(str(callback.dirpath), os.path.basename(path))):
            if os.path.isfile(found):
                return found
    return None


def pick_weights(trainer: pl.Trainer, module: Classifier, which: str) -> None:
    """Loads the (averaged) weights of the best or the last epoch.

    Without checkpoints the module keeps what `fit` left, the averaged weights of the last step.
    Resuming a run that was over already would leave the raw ones.
    """
    path = checkpoint_of(trainer, which)
    if path is not None:
        stored = torch.load(path, map_location="cpu", weights_only=True)
        module.load_state_dict(stored["state_dict"])


@rank_zero_only
def say(text: str) -> None:
    """Prints in the first process alone."""
    print(text, flush=True)
