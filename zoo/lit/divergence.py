"""Training that diverges stops at once, with what is needed to look into it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from zoo.errors import ZooError

_ADVICE = "a lower optim.lr, more lr_schedule.warmup_epochs or a trainer.gradient_clip_val may help"


class Diverged(ZooError):
    """A loss, weights or answers that are no longer finite numbers."""


def check_step(module: pl.LightningModule, outputs: Any, batch: Any, index: int) -> None:
    """Look at one step of training: its loss, and at the end of an epoch the weights.

    Args:
        module: What is trained.
        outputs: What `training_step` returned.
        batch: Images and labels.
        index: Of the batch in its epoch.

    Raises:
        Diverged: Something is not finite; the batch has been saved.
    """
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
    if isinstance(loss, Tensor) and not bool(loss.isfinite().all()):
        reason = f"the loss is {float(loss.detach().mean()):.3g}"
    elif module.trainer.is_last_batch and (name := _not_finite(module)):
        reason = f"the loss is {_number(loss)}, but {name} is no longer finite"
    else:
        return
    # Lightning has counted this step already.
    step = max(0, module.trainer.global_step - 1)
    where = f"at step {step} (epoch {module.trainer.current_epoch}, batch {index})"
    path = _save(module, batch, step=step, batch_idx=index, loss=_number(loss))
    raise Diverged(f"training diverged {where}: {reason}; the batch is in {path}; {_ADVICE}")


def check_answers(module: pl.LightningModule, part: str, logits: Tensor, batch: Any) -> None:
    """Look at the answers to a batch of validation or test images.

    Args:
        module: What is evaluated.
        part: `val` or `test`.
        logits: Answers `(B, classes)`.
        batch: Images and labels.

    Raises:
        Diverged: One is not finite; the batch has been saved.
    """
    rows = logits.isfinite().all(-1)
    if bool(rows.all()):
        return
    trainer = module.trainer
    first = int((~rows).int().argmax())
    value = float(logits[first][~logits[first].isfinite()][0])
    path = _save(module, batch, step=trainer.global_step, batch_idx=-1, loss=value)
    where = "training diverged" if part == "val" else "the model cannot be tested"
    raise Diverged(
        f"{where}: after step {trainer.global_step} (epoch {trainer.current_epoch}) it answers "
        f"{value:.3g} for image {first} of a {part} batch, which is in {path}; {_ADVICE}"
    )


def _not_finite(module: pl.LightningModule) -> str:
    """Name of the first parameter that is not finite; empty if all are."""
    named = [(n, p) for n, p in module.named_parameters() if p.is_floating_point()]
    whole = torch.stack([_own(p).isfinite().all() for _, p in named]) if named else None
    if whole is None or bool(whole.all()):
        return ""
    return named[int((~whole).int().argmax())][0].removeprefix("net.")


def _own(parameter: Tensor) -> Tensor:
    """A parameter, or the share of it that this process has."""
    share: Any = parameter.detach()
    return share.to_local() if hasattr(share, "to_local") else share  # type: ignore[no-any-return]


def _number(loss: Any) -> float:
    return float(loss.detach().mean()) if isinstance(loss, Tensor) else math.nan


def _save(module: pl.LightningModule, batch: Any, **said: float) -> Path:
    """Write a batch where the run writes; plain tensors and numbers."""
    rank = module.trainer.global_rank
    path = Path(module.trainer.default_root_dir) / f"diverged{rank or ''}.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    images, labels = (x.detach().cpu() for x in batch[:2])
    torch.save(
        {"images": images, "labels": labels, "epoch": module.trainer.current_epoch, **said}, path
    )
    return path
