"""Energies: how much of an image resembles a token.

Shapes: B batch, N tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reduction.eager import eager_on_cpu

ENERGIES = ("elu", "paper")
#: Similarities that stay in a core's cache, in float32, while several passes go over them.
_BLOCK = 2**17


@torch.no_grad()
def energy(
    similarity: Tensor, margin: float, kind: str = "elu", live: Tensor | None = None
) -> Tensor:
    """How much of the image looks like a token, `(B, N)` in float32 or better.

    Args:
        similarity: Cosines `(B, N, N)`.
        margin: Similarity from which another token counts as alike.
        kind: "elu" averages `elu(cos - margin)`; "paper" keeps the cosine itself above the margin.
        live: False marks padding, which is no part of the image, `(B, N)`; None: there is none.
    """
    if live is not None:
        total = _alike(similarity, margin, kind).masked_fill(~live.unsqueeze(1), 0.0).sum(-1)
        return total / live.sum(-1, keepdim=True).clamp_min(1) - 1
    if eager_on_cpu(similarity) and similarity.numel() > _BLOCK:
        n = similarity.shape[-1]
        rows = torch.split(similarity.reshape(-1, n), max(1, _BLOCK // n))
        means = [_alike(r, margin, kind).mean(-1) for r in rows]
        return torch.cat(means).view(similarity.shape[:-1]).sub_(1)
    return _alike(similarity, margin, kind).mean(-1).sub_(1)


def _alike(similarity: Tensor, margin: float, kind: str) -> Tensor:
    """How alike two tokens are, and 1: `elu(x) + 1 = max(x, 0) + exp(min(x, 0))`."""
    gap = similarity.to(torch.promote_types(similarity.dtype, torch.float32)) - margin
    low = gap.clamp_max(0)
    above = gap.sub_(low) if kind == "elu" else torch.where(gap > 0, gap + margin, 0)
    # On a CPU exp is ten times faster than the expm1 inside elu, and memory that is already there
    # faster than new.
    return above.add_(low.exp_())
