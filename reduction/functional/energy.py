"""Energies: how much of an image resembles a token.

Shapes: B batch, N tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reduction.eager import eager_on_cpu

#: Similarities that stay in a core's cache, in float32, while several passes go over them.
_BLOCK = 2**17


@torch.no_grad()
def energy(similarity: Tensor, margin: float, kind: str = "elu") -> Tensor:
    """How much of the image looks like a token, `(B, N)` in float32 or better.

    Args:
        similarity: Cosines `(B, N, N)`.
        margin: Similarity from which another token counts as alike.
        kind: "elu" averages `elu(cos - margin)`; "paper" keeps the cosine itself above the margin.
    """
    if eager_on_cpu(similarity) and similarity.numel() > _BLOCK:
        n = similarity.shape[-1]
        rows = torch.split(similarity.reshape(-1, n), max(1, _BLOCK // n))
        return torch.cat([_energy(r, margin, kind) for r in rows]).view(similarity.shape[:-1])
    return _energy(similarity, margin, kind)


def _energy(similarity: Tensor, margin: float, kind: str) -> Tensor:
    gap = similarity.to(torch.promote_types(similarity.dtype, torch.float32)) - margin
    low = gap.clamp_max(0)
    above = gap.sub_(low) if kind == "elu" else torch.where(gap > 0, gap + margin, 0)
    # On a CPU exp is ten times faster than the expm1 inside elu, and memory that is already there
    # faster than new.
    return above.add_(low.exp_()).mean(-1).sub_(1)
