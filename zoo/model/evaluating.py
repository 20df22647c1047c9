"""Measuring a model without changing it: evaluation mode meanwhile, and every flag as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Meanwhile nothing is dropped by chance; afterwards every module is as it was.

    A model's own flag says nothing of its parts: a backbone may be frozen inside of a wrapper that
    trains, and an attached one trains without its wrapper.

    Args:
        *models: Any.
    """
    modes = [(part, part.training) for model in models for part in model.modules()]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for part, mode in modes:
            part.training = mode
