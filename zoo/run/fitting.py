"""Runs Lightning's `fit`, says how to go on where it was stopped, picks the weights it leaves."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from zoo.errors import ZooError
from zoo.run.record import check_folder

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
        say(f"\nstopped in epoch {trainer.current_epoch}; {_how_to_go_on(trainer)}")
        raise KeyboardInterrupt from None
    return time.monotonic() - started


def check_processes(trainer: pl.Trainer) -> None:
    """Refuses processes that end before a training is read out.

    What Lightning brings back from those that Python starts is the weights and one path. The
    shares of the splits, the epochs that were seen and the state of a search would stay behind.

    Raises:
        ZooError: With what to type.
    """
    method = getattr(trainer.strategy, "_start_method", "popen")
    if method != "popen":
        raise ZooError(
            f"trainer.strategy starts processes by Python's {method}, which end with all that "
            "training knows but its weights; type trainer.strategy=ddp, or torchrun before the "
            "command"
        )


def check_folders(trainer: pl.Trainer) -> None:
    """Refuses a training whose checkpoints could not be written, before it costs hours.

    Raises:
        ZooError: With the folder, and what to type.
    """
    for folder in dict.fromkeys(callback.dirpath for callback in _keepers(trainer)):
        if folder is not None and "://" not in str(folder):
            check_folder(os.path.relpath(folder), "callbacks.NAME.dirpath")


def checkpoint_of(trainer: pl.Trainer, which: str) -> str | None:
    """Path of the last or the best checkpoint of this run, if there is one."""
    for callback in _keepers(trainer):
        path = callback.best_model_path
        if (which == "last") != (callback.monitor is None) or not path:
            continue
        # A resumed run's own folder first: it may be a copy of the one that the path is of.
        for found in (os.path.join(str(callback.dirpath), os.path.basename(path)), path):
            if os.path.isfile(found):
                return found
    return None


def pick_weights(trainer: pl.Trainer, module: Classifier, which: str) -> str:
    """Loads the (averaged) weights of the best or the last epoch.

    Without checkpoints the module keeps what `fit` left, the averaged weights of the last step.
    Resuming a run that was over already would leave the raw ones.

    Returns:
        What the weights are of, in words.
    """
    path = checkpoint_of(trainer, which)
    if path is not None:
        stored = torch.load(path, map_location="cpu", weights_only=True)
        module.load_state_dict(stored["state_dict"])
        return f"the {which} epoch"
    if which == "best" and any(callback.monitor for callback in _keepers(trainer)):
        say("no epoch was kept as the best one: the weights of the last step are tested")
    return "the last step"


def _keepers(trainer: pl.Trainer) -> list[ModelCheckpoint]:
    return [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]


def _how_to_go_on(trainer: pl.Trainer) -> str:
    if not _keepers(trainer):
        return "no callback keeps checkpoints, so there is nothing to go on from"
    path = checkpoint_of(trainer, "last") or checkpoint_of(trainer, "best")
    return f"go on with the same command and ckpt={path}" if path else "no epoch was complete"


@rank_zero_only
def say(text: str) -> None:
    """Prints in the first process alone."""
    print(text, flush=True)
