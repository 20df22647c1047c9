"""Which patches of an image can be predicted from their neighbours, by pixels alone.

Shapes: B images, h x w patches, D values in each.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Predicted(NamedTuple):
    """What is kept.

    Attributes:
        kept: `(B, P)` bool, row by row.
        source: The kept patch that stands for each patch, `(B, P)`.
    """

    kept: Tensor
    source: Tensor


def patch_vectors(images: Tensor, grid: tuple[int, int]) -> Tensor:
    """The pixels of every patch, `(B, h, w, D)`; a margin that is in no patch is left out."""
    rows, columns = grid
    height, width = images.shape[2] // rows, images.shape[3] // columns
    x = images[:, :, : rows * height, : columns * width]
    x = x.reshape(x.shape[0], x.shape[1], rows, height, columns, width)
    return x.permute(0, 2, 4, 1, 3, 5).flatten(3)


def apart(x: Tensor, y: Tensor, metric: str) -> Tensor:
    """How far patches are apart, over the last dimension: "max", "mae" or "rmse"."""
    gap = (x - y).abs()
    if metric == "max":
        return gap.amax(-1)
    return gap.mean(-1) if metric == "mae" else gap.square().mean(-1).sqrt()


@torch.no_grad()
def predicted_2d(x: Tensor, metric: str, threshold: float, anchored: bool) -> Predicted:
    """Predict every patch from the left or the upper one.

    With A left, B upper and C upper left of a patch, B predicts it where C is like A and not like
    B, and A does otherwise: an edge runs on. In the first row and column there is one neighbour.

    Args:
        x: `(B, h, w, D)`.
        metric: See `apart`.
        threshold: Patches up to this far apart are alike.
        anchored: A patch that was dropped counts as what predicted it from then on; otherwise all
            comparisons are of true pixels.
    """
    batch, rows, columns, _ = x.shape
    seen = x.clone()
    kept = torch.ones(batch, rows, columns, dtype=torch.int8, device=x.device)
    index = torch.arange(rows * columns, device=x.device).view(1, rows, columns)
    source = index.expand(batch, -1, -1).clone()
    # What a patch looks at lies on earlier diagonals, so those of one diagonal go together.
    for diagonal in range(1, rows + columns - 1):
        r = torch.arange(max(0, diagonal - columns + 1), min(rows, diagonal + 1), device=x.device)
        c = diagonal - r
        above, left = (r - 1).clamp_min(0), (c - 1).clamp_min(0)
        values = seen if anchored else x
        a, b, corner = values[:, r, left], values[:, above, c], values[:, above, left]
        edge = (apart(corner, a, metric) <= threshold) & (apart(corner, b, metric) > threshold)
        upper = ((r > 0) & (edge | (c == 0))).unsqueeze(-1)
        predictor = torch.where(upper, b, a)
        alike = apart(x[:, r, c], predictor, metric) <= threshold
        origin = torch.where(upper.squeeze(-1), source[:, above, c], source[:, r, left])
        kept[:, r, c] = (~alike).to(kept.dtype)
        source[:, r, c] = torch.where(alike, origin, source[:, r, c])
        seen[:, r, c] = torch.where(alike.unsqueeze(-1), predictor, seen[:, r, c])
    return Predicted(kept.flatten(1) > 0, source.flatten(1))


@torch.no_grad()
def runs(x: Tensor, metric: str, threshold: float, serpentine: bool) -> Predicted:
    """Keep the first patch of every run of patches that are like it, in the order of a scan.

    Args:
        x: `(B, h, w, D)`.
        metric: See `apart`.
        threshold: Patches up to this far apart are alike.
        serpentine: Odd rows are scanned backwards; otherwise all rows forwards.
    """
    batch, rows, columns, _ = x.shape
    order = torch.arange(rows * columns, device=x.device).view(rows, columns)
    if serpentine:
        odd = torch.arange(rows, device=x.device).unsqueeze(1) % 2 == 1
        order = torch.where(odd, order.flip(1), order)
    order = order.flatten()
    line = x.flatten(1, 2)[:, order]
    anchor, holder = line[:, 0], order[:1].expand(batch)
    kept, source = [torch.ones_like(holder)], [holder]
    for i in range(1, rows * columns):
        alike = apart(line[:, i], anchor, metric) <= threshold
        anchor = torch.where(alike.unsqueeze(-1), anchor, line[:, i])
        holder = torch.where(alike, holder, order[i])
        kept.append((~alike).to(holder.dtype))
        source.append(holder)
    back = order.argsort()
    return Predicted(torch.stack(kept, 1)[:, back] > 0, torch.stack(source, 1)[:, back])
