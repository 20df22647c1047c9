"""Learning rates over a run, as plain functions of the step.

Each builder returns torch's LambdaLR, which Lightning saves and restores: its whole state is the
step, so a resumed run goes on exactly, and a run resumed with more epochs follows the longer curve.
(The factors are closures for that reason: LambdaLR would save the attributes of an object.)
"""

from __future__ import annotations

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from zoo.errors import ZooError


def cosine(
    optimizer: Optimizer,
    total_steps: int,
    steps_per_epoch: float,
    warmup_epochs: float = 0.0,
    warmup_start: float = 0.0,
    final: float = 0.0,
) -> LambdaLR:
    """Linear warm-up, then half a cosine down to `final`.

    Args:
        optimizer: Its learning rates are the peak.
        total_steps: Optimizer steps of the run.
        steps_per_epoch: Optimizer steps of an epoch.
        warmup_epochs: Length of the warm-up; may be a fraction.
        warmup_start: Factor of the peak at the first step.
        final: Factor of the peak at the last step.
    """
    warmup = _warmup_steps(warmup_epochs, steps_per_epoch, total_steps)

    def factor(step: int) -> float:
        if step < warmup:
            return _ramp(step, warmup, warmup_start)
        done = (step - warmup) / max(1, total_steps - 1 - warmup)
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

    return LambdaLR(optimizer, factor)


def constant(
    optimizer: Optimizer,
    total_steps: int,
    steps_per_epoch: float,
    warmup_epochs: float = 0.0,
    warmup_start: float = 0.0,
) -> LambdaLR:
    """Linear warm-up, then the peak until the end. Arguments as for `cosine`."""
    warmup = _warmup_steps(warmup_epochs, steps_per_epoch, total_steps)
    return LambdaLR(
        optimizer, lambda step: _ramp(step, warmup, warmup_start) if step < warmup else 1.0
    )


def wsd(
    optimizer: Optimizer,
    total_steps: int,
    steps_per_epoch: float,
    warmup_epochs: float = 0.0,
    warmup_start: float = 0.0,
    decay: float = 0.2,
    final: float = 0.0,
) -> LambdaLR:
    """Warm-up, stable peak, then a linear decay over the last part `decay` of the run.

    Other arguments as for `cosine`.

    Raises:
        ZooError: `decay` is not in [0, 1].
    """
    if not 0 <= decay <= 1:
        raise ZooError(f"lr_schedule.decay must be in [0, 1], got {decay}")
    warmup = _warmup_steps(warmup_epochs, steps_per_epoch, total_steps)
    start = total_steps - round(decay * total_steps)

    def factor(step: int) -> float:
        if step < warmup:
            return _ramp(step, warmup, warmup_start)
        done = (step - start) / max(1, total_steps - 1 - start)
        return 1 - (1 - final) * min(1.0, max(0.0, done))

    return LambdaLR(optimizer, factor)


def _warmup_steps(epochs: float, steps_per_epoch: float, total: int) -> int:
    if epochs < 0:
        raise ZooError(f"lr_schedule.warmup_epochs must be 0 or more, got {epochs}")
    return min(round(epochs * steps_per_epoch), max(0, total - 1))


def _ramp(step: int, steps: int, start: float) -> float:
    return start + (1 - start) * (step + 1) / (steps + 1)
