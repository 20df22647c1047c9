"""Operations spelt so that every exporter takes them and every runtime computes the same."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import torch
from torch import Tensor

from reduction.eager import exporting


def stable_order(x: Tensor, dim: int = 1, descending: bool = False) -> Tensor:
    """Indices that sort `x` along a dimension; equal entries stay in their order.

    ONNX knows no sort that is stable by name, and the sorts of other runtimes, torch's among them,
    are not where nobody asks. Entries are then numbered by value and place, which no two share.

    Args:
        x: Any tensor.
        dim: Along which dimension.
        descending: Largest first.
    """
    if not exporting():
        return x.argsort(dim=dim, descending=descending, stable=True)
    values, order = x.movedim(dim, -1).sort(dim=-1, descending=descending)
    later = (values[..., 1:] != values[..., :-1]).long().cumsum(-1)
    value = torch.zeros_like(order).scatter(-1, order, torch.cat([order[..., :1] * 0, later], -1))
    number = value * x.shape[dim] + torch.arange(x.shape[dim], device=x.device)
    return number.argsort(dim=-1).movedim(-1, dim)


def running_max(x: Tensor) -> Tensor:
    """The largest entry so far along dimension 1, which ONNX has no operation for."""
    if not exporting():
        return x.cummax(1).values
    rows = [x[:, 0]]
    for i in range(1, x.shape[1]):
        rows.append(torch.maximum(rows[-1], x[:, i]))
    return torch.stack(rows, dim=1)


def kth_smallest(x: Tensor, k: int) -> Tensor:
    """The k-th smallest entry along the last dimension, k from 1."""
    if exporting():  # ONNX has no `kthvalue`
        return x.topk(k, dim=-1, largest=False).values[..., -1]
    return x.kthvalue(k, dim=-1).values


# Of the call that exports, and of no other thread's.
_rounded: ContextVar[bool] = ContextVar("to_be_rounded", default=False)


@contextlib.contextmanager
def to_be_rounded() -> Iterator[None]:
    """Within, what is exported may be quantised: a maximum and what it is compared with, apart."""
    before = _rounded.set(True)
    try:
        yield
    finally:
        _rounded.reset(before)


def best_of(x: Tensor) -> tuple[Tensor, Tensor]:
    """The largest entry along the last dimension, and where it is; the first of equal ones."""
    if not exporting() or _rounded.get():
        return x.max(-1)
    # Runtimes find a place by sorting the largest to the front; a maximum of whole numbers is
    # cheaper. They are int32, since bfloat16 knows none above 256.
    best, n = x.amax(-1), x.shape[-1]
    left = torch.arange(n, 0, -1, dtype=torch.int32, device=x.device)
    found = torch.where(x >= best.unsqueeze(-1), left, torch.zeros_like(left)).amax(-1).long()
    # Looked up, not reckoned: OpenVINO runs arithmetic behind an integer reduction within it, and
    # answers nonsense there for all images behind the first x.shape[1].
    place = torch.arange(n, -1, -1, device=x.device).clamp_max(n - 1)  # 0: of what is no number
    return best, place[found]


def sigmoid(x: Tensor) -> Tensor:
    """The logistic function, also far down, where scores are still told apart by it."""
    # ONNX Runtime answers 1.5e-8 for everything below -18.
    return (-x).exp().add(1).reciprocal() if exporting() else x.sigmoid()
