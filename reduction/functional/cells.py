"""Square cells of several patches, seen as one patch of an image at lower resolution.

Shapes: B images, P = h x w patches; a cell of scale s is 2^s x 2^s of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

BINS = 512
#: Of red, green and blue in grey.
_GREY = (0.2989, 0.5870, 0.1140)


def cell_grid(grid: tuple[int, int], scale: int) -> tuple[int, int]:
    """Rows and columns of whole cells."""
    return grid[0] >> scale, grid[1] >> scale


def corners(grid: tuple[int, int], scale: int, device: torch.device) -> Tensor:
    """The upper left patch of every whole cell, row by row, `(cells,)`."""
    rows, columns = cell_grid(grid, scale)
    side = 1 << scale
    row = torch.arange(rows, device=device) * side * grid[1]
    return (row.unsqueeze(1) + torch.arange(columns, device=device) * side).flatten()


def members(grid: tuple[int, int], scale: int, device: torch.device) -> Tensor:
    """The patches of every whole cell, `(cells, 4^s)`."""
    side = torch.arange(1 << scale, device=device)
    inside = (side.unsqueeze(1) * grid[1] + side).flatten()
    return corners(grid, scale, device).unsqueeze(1) + inside


def lowered(images: Tensor, grid: tuple[int, int], scale: int) -> Tensor:
    """Images at `2^-s` of their resolution, without the border that is in no whole cell.

    Bilinear and without antialiasing, as the published tokenisers: pixels in the middle of each
    block count alone.
    """
    rows, columns = cell_grid(grid, scale)
    height, width = images.shape[2] // grid[0] << scale, images.shape[3] // grid[1] << scale
    side, middle = 1 << scale, slice((1 << scale) // 2 - 1, (1 << scale) // 2 + 1)
    x = images[:, :, : rows * height, : columns * width]
    x = x.unflatten(2, (-1, side)).unflatten(4, (-1, side))  # type: ignore[no-untyped-call]
    low: Tensor = x[:, :, :, middle, :, middle].mean((3, 5))
    return low


def grey(pixels: Tensor) -> Tensor:
    """Grey values `(B, H, W)` of pixels in [0, 1], from 0 to 255."""
    if pixels.shape[1] != 3:
        return pixels.mean(1) * 255
    weight = pixels.new_tensor(_GREY).view(1, 3, 1, 1)
    return (pixels * 255 * weight).sum(1)


def by_cell(x: Tensor, grid: tuple[int, int], scale: int) -> Tensor:
    """Values `(B, H, W)` of every whole cell, `(B, cells, pixels)`."""
    rows, columns = cell_grid(grid, scale)
    height, width = x.shape[1] // grid[0] << scale, x.shape[2] // grid[1] << scale
    x = x[:, : rows * height, : columns * width].reshape(-1, rows, height, columns, width)
    return x.transpose(2, 3).flatten(3).flatten(1, 2)


@torch.no_grad()
def entropies(values: Tensor, grid: tuple[int, int], scale: int) -> Tensor:
    """Entropy in bits of the grey values of every cell, in 512 bins, `(B, cells)`.

    Args:
        values: Of `grey`, `(B, H, W)`.
        grid: h and w.
        scale: s.
    """
    x = by_cell(values, grid, scale)
    index = (x * BINS / 255).floor().long().clamp(0, BINS - 1)
    count = x.new_zeros(x.shape[0], x.shape[1], BINS).scatter_add(2, index, torch.ones_like(x))
    share = count / x.shape[2]
    # Published with share + 1e-10, which differs by no bit unless the share is zero; exporters drop
    # an addend as small as this.
    return -(share * share.clamp_min(1e-10).log2()).sum(-1)
