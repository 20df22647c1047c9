"""Building models without content: on the meta device, names and shapes only, with any timm."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


@contextmanager
def hollow() -> Iterator[None]:
    """Within, tensors are made on the meta device, and nothing asks what is in them."""
    with torch.device("meta"), _NoContent():
        yield


class _NoContent(TorchFunctionMode):
    """Answers what constructors ask of tensors without data."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.erfinv_:  # the slow part of timm's initialisation fills nothing
            return args[0]
        # timm before 1.0.21 reads the rates of stochastic depth off a tensor; zero by default.
        if func in (torch.Tensor.item, torch.Tensor.tolist) and args[0].is_meta:
            return torch.zeros(args[0].shape, device="cpu").tolist()
        return func(*args, **(kwargs or {}))
