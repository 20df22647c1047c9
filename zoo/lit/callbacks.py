"""What happens around training steps: averaged weights, reproducible epochs."""

from __future__ import annotations

import contextlib
import difflib
import random
import sys
from collections.abc import Collection, Sequence
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, TQDMProgressBar, WeightAveraging
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from torch import Tensor

from zoo.data.sampler import epoch_seed
from zoo.errors import ZooError
from zoo.measure.progress import shown


class EMA(WeightAveraging):
    """Exponential moving average of the weights; validation, test and checkpoints use it.

    Checkpoints hold the averaged weights under `state_dict`, and the raw ones, which training goes
    on from, under `current_model_state`.

    Args:
        decay: Of the average, per optimiser step.
        warmup: Start with a small decay, (1 + n) / (10 + n) at step n, so that the first,
            arbitrary weights are forgotten soon. Without it a short run ends on them.

    Raises:
        ZooError: `decay` is not in [0, 1).
    """

    def __init__(self, decay: float = 0.999, warmup: bool = True) -> None:
        if not 0 <= decay < 1:
            raise ZooError(f"ema decay must be in [0, 1), got {decay}")
        self.decay, self.warmup = decay, warmup
        super().__init__(avg_fn=self._average)

    def _average(self, average: Tensor, current: Tensor, seen: Tensor | int) -> Tensor:
        decay = self.decay
        if self.warmup:
            steps = int(seen)
            decay = min(decay, (1 + steps) / (10 + steps))
        if not torch.is_floating_point(average):
            return current
        return torch.lerp(current, average, decay)


class EpochSeed(Callback):
    """Seed all random numbers by (seed, epoch, process) when an epoch starts.

    Augmentation, mixup and dropout then do not depend on what ran before: a resumed run is the
    same as one that was never interrupted.

    Args:
        seed: Of the run.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Seed Python, numpy and torch."""
        seed = epoch_seed(self.seed, trainer.current_epoch, trainer.global_rank)
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        data: Any = getattr(trainer, "datamodule", None)
        if hasattr(data, "set_epoch"):
            data.set_epoch(trainer.current_epoch)


def check_monitors(trainer: pl.Trainer, logged: Collection[str]) -> None:
    """Refuses callbacks that watch a quantity which nothing logs.

    Args:
        trainer: With its callbacks.
        logged: What the module logs, the reducer's own losses (`train/loss_NAME`) left out.

    Raises:
        ZooError: Lightning would say so at the end of the first epoch.
    """
    callbacks: Sequence[Callback] = getattr(trainer, "callbacks")  # noqa: B009  (Lightning hides it)
    for callback in callbacks:
        name = getattr(callback, "monitor", None)
        if isinstance(name, str) and name not in logged and not name.startswith("train/loss_"):
            near = difflib.get_close_matches(name, logged, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(logged))}"
            raise ZooError(f"monitor={name} of {type(callback).__name__}: not logged; {hint}")


class ProgressBar(TQDMProgressBar):
    """Lightning's bars, on stderr, and only where bars show: stdout is for what was found.

    Args:
        refresh_rate: Batches between two updates of the bar; 0 for none.
    """

    def __init__(self, refresh_rate: int = 1) -> None:
        super().__init__(refresh_rate=refresh_rate)

    @property
    def is_enabled(self) -> bool:
        """Whether anything is drawn."""
        return super().is_enabled and shown()

    def init_sanity_tqdm(self) -> Tqdm:
        """The bar of the batches before training."""
        with contextlib.redirect_stdout(sys.stderr):
            return super().init_sanity_tqdm()

    def init_train_tqdm(self) -> Tqdm:
        """The bar of an epoch."""
        with contextlib.redirect_stdout(sys.stderr):
            return super().init_train_tqdm()

    def init_validation_tqdm(self) -> Tqdm:
        """The bar of the validation split."""
        with contextlib.redirect_stdout(sys.stderr):
            return super().init_validation_tqdm()

    def init_test_tqdm(self) -> Tqdm:
        """The bar of the test split."""
        with contextlib.redirect_stdout(sys.stderr):
            return super().init_test_tqdm()
