"""VScan, first stage: what a shallow block attends to in every window, and a deep one overall."""

from __future__ import annotations

import torch
from torch import Tensor

from reduction.base import Card
from reduction.checks import count, share
from reduction.errors import ZooError
from reduction.selection.base import Compat, Selection, Selector, answer, whole_number
from reduction.selection.given import Given
from reduction.selection.ranking import first, marked, nearest, places, slots, sums
from reduction.selection.registry import register_selector
from reduction.tokens import take_rows


@register_selector("vscan")
class VScan(Selector):
    """Local and global scan; every other patch is averaged into the kept one most like it.

    Args:
        window: Side of the windows. Where it does not divide the grid, windows of 4 with ragged
            ones at the border share the local budget (the official form for Qwen).
        local: Share of K that windows are given.
        compat: "official" hands on fewer than K tokens where the windows do not divide their share.

    Raises:
        ZooError: If an argument is out of range.

    References:
        Zhang et al., TMLR 2026, arXiv 2505.22654; official code
        github.com/Tencent/SelfEvolvingAgent (MIT).
    """

    card = Card(
        title="VScan: Rethinking Visual Token Reduction for Efficient Large Vision-Language Models",
        authors="Zhang et al.",
        venue="TMLR",
        year=2026,
        arxiv="2505.22654",
        code="https://github.com/Tencent/SelfEvolvingAgent/tree/main/VScan",
        licence="MIT",
        kind="attention + merge",
        training="none",
        note="The first stage; the second prunes inside the language model.",
    )
    reads = ("attention",)
    projected = True
    raster = True

    def __init__(self, window: int = 6, local: float = 0.5, compat: Compat | None = None) -> None:
        super().__init__(compat)
        self.window = count("window", window)
        self.local = share("local", local)

    def shallow_block(self, depth: int) -> int:
        """See `Selector`."""
        return round(depth / 4) - 1

    def rows(self, n: int, keep: int, grid: tuple[int, int] | None = None) -> int:
        """See `Selector`."""
        if not self.official:
            return super().rows(n, keep, grid)
        side = round(n**0.5)
        if grid is None and side * side != n:
            raise ZooError(f"vscan: expected grid=(rows, columns) of {n} tokens, got none")
        windows = self._windows(grid or (side, side))
        local = int(keep * self.local)
        return min(n, windows * (local // windows) + keep - local)

    def _windows(self, grid: tuple[int, int]) -> int:
        if grid[0] % self.window or grid[1] % self.window:
            raise ZooError(
                f"vscan: the official code needs a grid of {self.window}x{self.window} windows, "
                f"got {grid[0]}x{grid[1]}; leave compat out"
            )
        return (grid[0] // self.window) * (grid[1] // self.window)

    def pick(self, given: Given, keep: int | None) -> Selection:
        """See `Selector`."""
        k = whole_number(keep, "vscan")
        grid = given.raster("vscan")
        total = self.rows(given.n, k, grid)
        shallow = given.attention("vscan", shallow=True)
        local = self._local(shallow, grid, int(k * self.local))
        deep = given.attention("vscan")
        # First what the windows gave, then the best of the others.
        index = first(local, deep, total)
        order, index = index, index.sort(dim=1).values
        p = given.features.to(given.x.dtype)
        own = slots(index, given.n)
        slot = torch.where(own < 0, nearest(given.x, take_rows(given.x, index)), own)
        added, members = sums(p, slot, total)
        rows = (added / members).to(given.features.dtype)
        return answer(rows, index, order, given.n, slot)

    def _local(self, a: Tensor, grid: tuple[int, int], budget: int) -> Tensor:
        """Mask of the patches that the windows choose."""
        exact = grid[0] % self.window == 0 and grid[1] % self.window == 0
        side = self.window if exact or self.official else 4
        down, across = max(1, grid[0] // side), max(1, grid[1] // side)
        row = (torch.arange(grid[0], device=a.device) // side).clamp_max(down - 1)
        column = (torch.arange(grid[1], device=a.device) // side).clamp_max(across - 1)
        window = (row.unsqueeze(1) * across + column).flatten()
        windows = down * across
        each = budget // windows if exact or self.official else -(-budget // windows)
        inside = places(a, window, windows) < each
        if exact or self.official:
            return inside
        # A cap for each window; the budget is spent on the best of all.
        return inside & marked(first(inside, a, budget), a.shape[1])
