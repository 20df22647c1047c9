"""Masks through which gradients flow, for methods that train without removing tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reduction.eager import recording, undisturbed


def policy_softmax(logits: Tensor, policy: Tensor, eps: float = 1e-6) -> Tensor:
    """Softmax over keys weighted by a keep mask.

    Every token always sees itself. The multiplicative form is used because the logarithm of a
    mask has no gradient at zero. The maximum is taken over all keys, masked ones included.

    Args:
        logits: `(B, H, N, N)`.
        policy: `(B, N)`, one keeps and zero masks.
        eps: Keeps rows without any key finite.

    Returns:
        Attention weights `(B, H, N, N)` in the dtype of `logits`, computed in float32.

    References:
        DynamicViT, arXiv 2106.02034; DiffRate, arXiv 2305.17997.
    """
    if logits.dtype == torch.float32 and recording(logits, policy) and undisturbed(logits):
        masked: Tensor = _PolicySoftmax.apply(logits, policy.float(), eps)
        return masked
    n = logits.shape[-1]
    z = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    seen = policy.to(z.dtype)[:, None, None, :]
    seen = seen + (1.0 - seen) * torch.eye(n, dtype=z.dtype, device=z.device)
    weight = (z - z.amax(-1, keepdim=True)).exp() * seen
    return ((weight + eps / n) / (weight.sum(-1, keepdim=True) + eps)).to(logits.dtype)


class _PolicySoftmax(torch.autograd.Function):
    """`policy_softmax` with its backward pass in half the sweeps over maps, and one map kept."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, policy: Tensor, eps: float) -> Tensor:
        top, place = z.max(-1, keepdim=True)
        power = (z - top).exp_()
        weight = power * policy[:, None, None, :]
        # A token sees itself, whatever its policy.
        weight.diagonal(dim1=-2, dim2=-1).copy_(power.diagonal(dim1=-2, dim2=-1))
        total = weight.sum(-1, keepdim=True).add_(eps)
        ctx.save_for_backward(power, policy, total, place)
        ctx.eps = eps
        return weight.add_(eps / z.shape[-1]).div_(total)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        power, policy, total, place = ctx.saved_tensors
        eps = ctx.eps
        weight = power * policy[:, None, None, :]
        weight.diagonal(dim1=-2, dim2=-1).copy_(power.diagonal(dim1=-2, dim2=-1))
        mean = grad.mean(-1, keepdim=True)
        # The sum of grad times output, with the output written as (weight + eps / n) / total.
        inner = (torch.linalg.vecdot(grad, weight).unsqueeze(-1) + eps * mean) / total
        slope = (grad - inner).div_(total)
        of_policy = None
        if ctx.needs_input_grad[1]:
            share = power * slope
            share.diagonal(dim1=-2, dim2=-1).zero_()
            of_policy = share.sum((1, 2))
        of_logits = None
        if ctx.needs_input_grad[0]:
            of_logits = weight.mul_(slope)
            # The maximum matters only through eps, but it does.
            of_logits.scatter_add_(-1, place, (mean - inner).mul_(eps).div_(total))
        return of_logits, of_policy, None
