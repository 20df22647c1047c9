"""Fixed patterns on the patch grid: rings around the centre of the image.

References:
    Haurum et al., ICCVW 2023, arXiv 2308.04657; official code
    github.com/JoakimHaurum/TokenReduction (MIT).
"""

from __future__ import annotations

import functools

import torch

PATTERNS = ("l1", "l2", "linf")


def _axis(length: int) -> list[float]:
    # Python's floor: odd lengths come out off-centre, as in the official code.
    low, high = -length // 2, length // 2
    return torch.linspace(low, high, length).tolist()


@functools.lru_cache(maxsize=64)
def _distances(pattern: str, grid: tuple[int, int]) -> tuple[float, ...]:
    y = torch.tensor(_axis(grid[0])).unsqueeze(1)
    x = torch.tensor(_axis(grid[1])).unsqueeze(0)
    if pattern == "l1":
        z = x.abs() + y.abs()
    elif pattern == "l2":
        z = (x.square() + y.square()).sqrt()
    else:
        z = torch.maximum(x.abs().expand(grid), y.abs().expand(grid))
    return tuple(z.reshape(-1).tolist())


@functools.lru_cache(maxsize=64)
def _ring_counts(pattern: str, grid: tuple[int, int]) -> tuple[int, ...]:
    z = _distances(pattern, grid)
    return tuple(sum(v <= edge for v in z) for edge in sorted(set(z)))


# Compilers must take these numbers instead of tracing how they come about: float32 sums of equal
# distances may differ in the last bit and then count as two rings, in the official code as here.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def distances(pattern: str, grid: tuple[int, int]) -> tuple[float, ...]:
    """Distance of each patch from the centre, row-major, as the official code measures it."""
    return _distances(pattern, grid)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def ring_counts(pattern: str, grid: tuple[int, int]) -> tuple[int, ...]:
    """Number of patches within each distinct distance, ascending."""
    return _ring_counts(pattern, grid)
