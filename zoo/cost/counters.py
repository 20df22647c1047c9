"""Two independent counters that check the analytic count: of fvcore and of torch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from zoo.model.attached import as_tensors
from zoo.model.evaluating import evaluating


def _sdpa_macs(inputs: list[Any], outputs: list[Any]) -> int:
    """fvcore handler: both products of scaled dot-product attention."""
    q, k, v = (_shape(x) for x in inputs[:3])
    return prod(q[:-1]) * k[-2] * (q[-1] + v[-1])


def _cdist_macs(inputs: list[Any], outputs: list[Any]) -> int:
    a, b = (_shape(x) for x in inputs[:2])
    return prod(a[:-1]) * b[-2] * a[-1]


def _baddbmm_macs(inputs: list[Any], outputs: list[Any]) -> int:
    a, b = _shape(inputs[1]), _shape(inputs[2])
    return prod(a) * b[-1]


def _shape(value: Any) -> list[int]:
    return value.type().sizes()


def _nothing(inputs: list[Any], outputs: list[Any]) -> int:
    return 0


FVCORE_HANDLERS: dict[str, Callable[[list[Any], list[Any]], int]] = {
    "aten::scaled_dot_product_attention": _sdpa_macs,
    "aten::cdist": _cdist_macs,
    "aten::_cdist": _cdist_macs,
    "aten::_euclidean_dist": _cdist_macs,
    "aten::baddbmm": _baddbmm_macs,
    # fvcore counts norms (0.0095 G on DeiT-S); the convention here does not.
    "aten::layer_norm": _nothing,
    "aten::batch_norm": _nothing,
}


def fvcore_gmacs(model: nn.Module, images: Tensor) -> float:
    """Count one image with fvcore and handlers for what it leaves out.

    Args:
        model: Any model; it is traced in evaluation mode.
        images: `(B, 3, H, W)`; the count is per image.
    """
    from fvcore.nn import FlopCountAnalysis

    model = as_tensors(model)
    with evaluating(model):
        count = FlopCountAnalysis(model, images).set_op_handle(**FVCORE_HANDLERS)
        count.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        count.tracer_warnings("none")
        return count.total() / images.shape[0] / 1e9


def torch_gmacs(model: nn.Module, images: Tensor) -> float:
    """Count one image with torch's FlopCounterMode on the meta device, where it sees attention.

    Args:
        model: Any model; a copy of it runs in evaluation mode, without data.
        images: `(B, 3, H, W)`; the count is per image.
    """
    from torch.utils.flop_counter import FlopCounterMode

    # Without frozen parameters the counter hooks views of them and fails.
    ghost = copy.deepcopy(as_tensors(model)).to("meta").eval().requires_grad_(False)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        ghost(images.to("meta"))
    # The counter counts a multiply-accumulate as two operations.
    return counter.get_total_flops() / 2 / images.shape[0] / 1e9
