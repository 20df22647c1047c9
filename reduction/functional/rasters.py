"""Rasters of tokens that shrink and stay rasters.

A raster that only ever loses single rows and columns, in an order that follows from its first size,
has a different number of tokens in every state: from that number its shape is known again.
"""

from __future__ import annotations

from reduction.errors import ZooError


def shapes(grid: tuple[int, int], proportional: bool = False) -> list[tuple[int, int]]:
    """The shapes that a raster goes through, from `grid` down to a single token.

    Args:
        grid: Rows and columns.
        proportional: Keep the proportions of the sides; otherwise take as many rows as columns, a
            column first.
    """
    rows, columns = grid
    found = [(rows, columns)]
    while rows > 1 or columns > 1:
        if proportional:
            wide = columns * grid[0] >= rows * grid[1]
        else:
            wide = grid[1] - columns <= grid[0] - rows
        if (wide and columns > 1) or rows == 1:
            columns -= 1
        else:
            rows -= 1
        found.append((rows, columns))
    return found


def shape_of(n: int, known: list[tuple[int, int]]) -> tuple[int, int]:
    """The one shape of `known` that holds `n` tokens.

    Raises:
        ZooError: If none does.
    """
    for rows, columns in known:
        if rows * columns == n:
            return rows, columns
    raise ZooError(
        f"expected the tokens of a whole raster of {known[0][0]} x {known[0][1]} patches, or of "
        f"one that this method left, got {n} tokens; switch patch dropout and other methods off"
    )
