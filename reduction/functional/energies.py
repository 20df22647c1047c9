"""How much of an image looks like each of its tokens."""

from __future__ import annotations

import torch
from torch import Tensor

ENERGIES = ("elu", "paper")


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
    gap = similarity.to(torch.promote_types(similarity.dtype, torch.float32)) - margin
    low = gap.clamp_max(0)
    above = gap.sub_(low) if kind == "elu" else torch.where(gap > 0, gap + margin, 0)
    # On a CPU exp is ten times faster than the expm1 inside elu, and memory that is already there
    # faster than new.
    alike = above.add_(low.exp_())
    if live is None:
        return alike.mean(-1).sub_(1)
    total = alike.masked_fill(~live.unsqueeze(1), 0.0).sum(-1)
    return total / live.sum(-1, keepdim=True).clamp_min(1) - 1
