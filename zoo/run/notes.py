"""What the row of a training says in words."""

from __future__ import annotations

from typing import TYPE_CHECKING

import lightning.pytorch as pl

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from zoo.data.module import ImageData


_LIMITS = ("limit_train_batches", "limit_val_batches", "limit_test_batches", "fast_dev_run")


def training_notes(
    cfg: DictConfig, trainer: pl.Trainer, seconds: float, done: int | None, weights: str
) -> str:
    """How long a training took, from what it began, and what was left out.

    Args:
        cfg: Of the training.
        trainer: After it.
        seconds: Of fitting.
        done: The epoch after which it was resumed, or None.
        weights: Of which epoch the weights are.
    """
    start = cfg.weights or ("pretrained" if cfg.backbone and cfg.backbone.pretrained else "scratch")
    val = trainer.callback_metrics
    parts = [
        f"{trainer.current_epoch} epochs from {start} in {seconds:.0f} s",
        f"weights of {weights}",
    ]
    if done is not None:
        parts[0] += f", resumed after epoch {done}"
    if any(cfg.trainer.get(name) for name in _LIMITS):
        parts.append("on part of the data")
    if "train/loss_epoch" in val:
        parts.append(f"training loss {float(val['train/loss_epoch']):.4f}")
    return ", ".join(parts)


def unread_images(cfg: DictConfig, data: ImageData, seen: int) -> str | None:
    """How many test images are missing, in all processes; each knows its own alone."""
    try:
        whole = len(data.dataset("test"))
    except TypeError:
        return None  # a stream
    if seen >= whole or any(cfg.trainer.get(name) for name in _LIMITS):
        return None
    return f"{whole - seen} of {whole} test images could not be read"
