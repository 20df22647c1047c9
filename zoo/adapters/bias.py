"""Attention biases that depend on where tokens are: rows and columns of a table over the raster.

A family whose attention adds such a bias answers `Tower.biased` and `Tower.bias`; the latter asks
`bias_of` for what is left of the full table. A dropped token takes its row and column along. A
merged one has those of the token that gives it its position. A token without a position, as
plugins and mixtures make them, has no bias.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from reduction.tokens import Tokens


def bias_of(full: Tensor, t: Tokens, changed: bool) -> Tensor:
    """The bias among the tokens that are there now, `(1, H, P+N0, P+N0)` or `(B, H, P+N, P+N)`.

    Args:
        full: Bias among all tokens of the raster, `(H, P+N0, P+N0)`, prefix tokens first.
        t: Current tokens, with their origins where they have changed.
        changed: Whether tokens are no longer in their first places.
    """
    if not changed:
        return full.unsqueeze(0)
    assert t.origin is not None
    heads, length = full.shape[:2]
    index = torch.where(t.origin < 0, length, t.origin + t.prefix)
    prefix = torch.arange(t.prefix, device=index.device).expand(index.shape[0], -1)
    index = torch.cat([prefix, index], dim=1)
    # Flat, because its backward pass is a plain sum into rows.
    padded = F.pad(full, (0, 1, 0, 1)).flatten(1)
    places = index.unsqueeze(2) * (length + 1) + index.unsqueeze(1)
    rows = padded.index_select(1, places.flatten())
    return rows.view(heads, *places.shape).transpose(0, 1)
