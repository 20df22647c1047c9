"""Graphs over the patches of an image.

Shapes: B batch, N patches, C width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reduction.errors import ZooError
from reduction.functional.matching import unit


def spatial_neighbours(grid: tuple[int, int], device: torch.device | None = None) -> Tensor:
    """Which patches touch on the grid, corners included and itself not, `(N, N)` bool."""
    rows, columns = grid
    place = torch.arange(rows * columns, device=device)
    down, right = place // columns, place % columns
    apart = (down.unsqueeze(1) - down).abs().maximum((right.unsqueeze(1) - right).abs())
    return apart == 1


def semantic_neighbours(x: Tensor, count: int) -> Tensor:
    """Which patches resemble each patch most by cosine, itself not, `(B, N, N)` bool.

    Row i marks every patch whose cosine is not below the `count + 1` largest of the row, of which
    the patch itself is one. Not symmetric; ties mark more than `count`.
    """
    n = x.shape[1]
    u = unit(x)
    cosine = u @ u.transpose(1, 2)
    least = cosine.topk(min(count + 1, n), dim=-1).values[..., -1:]
    return (cosine >= least) & ~torch.eye(n, dtype=torch.bool, device=x.device)


@torch.no_grad()
def neighbour_graph(
    x: Tensor, grid: tuple[int, int], neighbours: int, spatial: bool = True
) -> Tensor:
    """Normalised graph `D^-1/2 G D^-1/2`, with the row sums of G in D.

    Args:
        x: Patches `(B, N, C)`, row-major over the grid.
        grid: Patch grid `(rows, columns)`.
        neighbours: Semantic neighbours of each patch; 0 makes none.
        spatial: Whether patches that touch are neighbours.

    Returns:
        `(B, N, N)` float32, or `(1, N, N)` where all images share it. Patches without neighbours
        have zeros.

    Raises:
        ZooError: If there are not as many patches as places on the grid.
    """
    if x.shape[1] != grid[0] * grid[1]:
        raise ZooError(
            f"expected {grid[0] * grid[1]} patches for a graph on a {grid[0]}x{grid[1]} grid, got "
            f"{x.shape[1]}; patch dropout does not go with it"
        )
    near = spatial_neighbours(grid, x.device).unsqueeze(0)
    if not spatial:
        near = semantic_neighbours(x, neighbours)
    elif neighbours:
        near = near | semantic_neighbours(x, neighbours)
    graph = near.float()
    root = graph.sum(-1).clamp_min(1).rsqrt()
    return graph * root.unsqueeze(-1) * root.unsqueeze(-2)
