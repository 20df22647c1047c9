"""Classifiers on an average over tokens, some of which are masked."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from reduction.tokens import Tokens


def masked_average_head(m: Any, t: Tokens, policy: Tensor) -> Tensor:
    """Logits of the mean weighted by size and mask; the mask acts through the numerator only.

    Args:
        m: A timm model whose `global_pool` is "avg".
        t: Tokens before the final norm.
        policy: `(B, P+N)`.
    """
    first = 0 if getattr(m, "pool_include_prefix", False) else t.prefix
    x = m.norm(t.x)[:, first:]
    weight = (t.size * policy)[:, first:]
    weight = (weight / weight.detach().sum(1, keepdim=True)).to(x.dtype)
    pooled = (x * weight.unsqueeze(-1)).sum(1)
    logits: Tensor = m.head(m.head_drop(m.fc_norm(pooled)))
    return logits
