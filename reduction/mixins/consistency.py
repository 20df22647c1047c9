"""Losses between two passes of one model, the second of which removes fewer tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from reduction.mixins.training import Outcome
from reduction.tokens import Tokens


def class_gap(outcome: Outcome) -> Tensor:
    """Mean squared difference to the teacher's class token, per image, `(B,)`.

    Where there is no prefix token, of the size-weighted means instead. The teacher gets no
    gradient from it.
    """
    assert outcome.teacher is not None
    return (_summary(outcome.teacher.final).detach() - _summary(outcome.final)).square().mean(1)


def _summary(t: Tokens) -> Tensor:
    if t.prefix:
        return t.x[:, 0]
    share = t.size / t.size.sum(1, keepdim=True)
    return (t.x * share.unsqueeze(2).to(t.x.dtype)).sum(1)


@torch.no_grad()
def confident(logits: Tensor, targets: Tensor, above: float) -> Tensor:
    """1 for images whose label, or labels together where they are mixed, are that probable.

    Args:
        logits: `(B, classes)`.
        targets: Labels `(B,)` or soft labels `(B, classes)`.
        above: Probability.
    """
    probability = logits.softmax(-1)
    if targets.dim() == 1:
        own = probability.gather(1, targets.unsqueeze(1)).squeeze(1)
    else:
        # Smoothing gives every class the same little; what has more is a label.
        own = (probability * (targets > targets.amin(1, keepdim=True))).sum(1)
    return (own > above).to(logits.dtype)
