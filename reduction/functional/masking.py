"""Masks through which gradients flow, for methods that train without removing tokens."""

from __future__ import annotations

import torch
from torch import Tensor


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
    n = logits.shape[-1]
    z = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    seen = policy.to(z.dtype)[:, None, None, :]
    seen = seen + (1.0 - seen) * torch.eye(n, dtype=z.dtype, device=z.device)
    weight = (z - z.amax(-1, keepdim=True)).exp() * seen
    return ((weight + eps / n) / (weight.sum(-1, keepdim=True) + eps)).to(logits.dtype)
