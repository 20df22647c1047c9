"""Local soft clustering of a raster around the centres of a coarser one.

Shapes: B batch, N patches of a raster of H x W, M centres of one of h x w, C width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Clusters(NamedTuple):
    """What was found.

    Attributes:
        x: What was clustered, `(B, N, C)`.
        shares: How much of each patch belongs to each centre, `(B, M, N)`; columns add up to one.
    """

    x: Tensor
    shares: Tensor

    @property
    def centres(self) -> Tensor:
        """`(B, M, C)`, row by row over the coarse raster."""
        return means(self.shares) @ self.x


def near_cells(
    grid: tuple[int, int], coarse: tuple[int, int], window: int, device: torch.device
) -> Tensor:
    """Which centres a patch may belong to, `(M, N)` bool: those of cells close to its own.

    Args:
        grid: H and W.
        coarse: h and w.
        window: Cells on a side of the neighbourhood; its half, rounded down, counts each way.
        device: Where.
    """
    sides = []
    for size, fewer in zip(grid, coarse, strict=True):
        home = torch.arange(size, device=device) * fewer // size
        sides.append((home - torch.arange(fewer, device=device)[:, None]).abs() <= window // 2)
    rows, columns = sides
    both = rows[:, None, :, None] & columns[None, :, None, :]
    return both.reshape(coarse[0] * coarse[1], grid[0] * grid[1])


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """`(B, M, N)` between `y` `(B, M, C)` and `x` `(B, N, C)`."""
    product = y @ x.transpose(1, 2)
    square = y.square().sum(-1).unsqueeze(2) + x.square().sum(-1).unsqueeze(1)
    return (square - 2 * product).clamp_min(0)


@torch.no_grad()
def clusters(
    x: Tensor,
    grid: tuple[int, int],
    coarse: tuple[int, int],
    iterations: int,
    temperature: float,
    window: int,
) -> Clusters:
    """Cluster a raster.

    Args:
        x: `(B, N, C)`, row by row.
        grid: H and W.
        coarse: h and w.
        iterations: At least 1.
        temperature: Factor on the squared distances.
        window: See `near_cells`.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    raster = x.transpose(1, 2).reshape(x.shape[0], x.shape[2], *grid)
    centres = pooled(raster, coarse).flatten(2).transpose(1, 2)
    close = near_cells(grid, coarse, window, x.device)
    share = x.new_zeros(())
    for i in range(iterations):
        if i:
            centres = means(share) @ x
        logits = (-temperature * squared_distances(x, centres)).masked_fill(~close, -torch.inf)
        share = logits.softmax(1)
    return Clusters(x, share)


def pooled(raster: Tensor, coarse: tuple[int, int]) -> Tensor:
    """Adaptive average pooling `(B, C, H, W)` to `(B, C, h, w)`, as two products.

    Exporters know no adaptive pooling of sizes that do not divide each other.
    """
    for dim, fewer in zip((2, 3), coarse, strict=True):
        size = raster.shape[dim]
        start = [i * size // fewer for i in range(fewer)]
        stop = [-(-(i + 1) * size // fewer) for i in range(fewer)]
        weight = raster.new_zeros(fewer, size)
        for i, (a, b) in enumerate(zip(start, stop, strict=True)):
            weight[i, a:b] = 1 / (b - a)
        raster = (raster.transpose(dim, 3) @ weight.t()).transpose(dim, 3)
    return raster


def means(share: Tensor) -> Tensor:
    """Shares as weights of means, rows adding up to one; an empty row stays zero."""
    return share / share.sum(2, keepdim=True).clamp_min(torch.finfo(share.dtype).tiny)
