"""What a selector is given: features and what the tower's attention said of them.

Shapes: B images, N rows to choose from, P prefix tokens, C width, H heads, d head width. Where a
language model reads groups of g patches, the rows are groups and signals are of N * g patches.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from reduction.errors import ZooError

#: Signals that `reduction.select` takes, with their shapes.
SIGNALS = {
    "cls_row": "(B, H, P+N) or (B, N)",
    "cls_row_shallow": "(B, H, P+N) or (B, N)",
    "column": "(B, P+N) or (B, N)",
    "column_shallow": "(B, P+N) or (B, N)",
    "q": "(B, H, P+N, d) or (B, P+N, C)",
    "k": "(B, H, P+N, d) or (B, P+N, C)",
    "quality": "(B, N)",
    "start": "(B,)",
    "groups": "(B, N)",
    "class_token": "(B, C)",
}
ORDERS = ("raster", "runs")


class Given(NamedTuple):
    """The inputs of a selector, checked.

    Attributes:
        features: What is chosen from, `(B, N, C)`, in the type of the tower.
        x: The same in float32 or better, without gradient: decisions are made on it.
        signals: By name, see `SIGNALS`; in float32 or better, without gradient.
        grid: Rows and columns of the N rows' raster; None where they lie in none.
        group: Patches in each row.
        patch_grid: Rows and columns of the patches' raster.
        runs: Whether the patches of a group follow each other, instead of lying in a raster.
        share: What was asked for, where it was a share and no number of tokens.
    """

    features: Tensor
    x: Tensor
    signals: Mapping[str, Tensor]
    grid: tuple[int, int] | None
    group: int = 1
    patch_grid: tuple[int, int] | None = None
    runs: bool = False
    share: float | None = None

    @property
    def n(self) -> int:
        """Rows N to choose from."""
        return int(self.features.shape[1])

    @property
    def images(self) -> int:
        """Images B."""
        return int(self.features.shape[0])

    def has(self, name: str) -> bool:
        """Whether a signal was given."""
        return name in self.signals

    def raster(self, who: str) -> tuple[int, int]:
        """Rows and columns, for a method that reads neighbourhoods.

        Raises:
            ZooError: If they are not known.
        """
        if self.grid is None:
            raise ZooError(
                f"{who} looks at neighbours on the image: expected grid=(rows, columns) with rows "
                f"* columns = {self.n}, got none; a reducer that breaks the raster inside the "
                "tower does not go with it"
            )
        return self.grid

    def attention(self, who: str, shallow: bool = False, total: bool = False) -> Tensor:
        """What every row is attended to, `(B, N)`, mean over heads.

        The class row; without a class token what all tokens pay, which ranks in its place.

        Args:
            who: Name of the method, for the message.
            shallow: Of the shallower of two blocks.
            total: Sum over heads instead of the mean.

        Raises:
            ZooError: If neither was given.
        """
        tail = "_shallow" if shallow else ""
        for name in (f"cls_row{tail}", f"column{tail}"):
            if name in self.signals:
                row = self.per_row(name)
                return row if row.dim() == 2 else (row.sum(1) if total else row.mean(1))
        raise ZooError(
            f"{who} needs cls_row{tail}={SIGNALS['cls_row']}, or column{tail}="
            f"{SIGNALS['column']} for a tower without class token; got {_names(self.signals)}"
        )

    def need(self, name: str, who: str) -> Tensor:
        """A signal as it was given.

        Raises:
            ZooError: If it is missing.
        """
        if name not in self.signals:
            raise ZooError(f"{who} needs {name}={SIGNALS[name]}; got {_names(self.signals)}")
        return self.signals[name]

    def per_row(self, name: str) -> Tensor:
        """A signal `(B, N)` or `(B, H, N)` of the rows: prefix cut off, mean over a group."""
        row = self.signals[name]
        return self.grouped(row[..., row.shape[-1] - self.n * self.group :])

    def keys(self, who: str) -> Tensor:
        """Keys of the rows, `(B, N, H, d)`; one head where they were given side by side.

        Raises:
            ZooError: If there are none.
        """
        k = self.need("k", who)
        k = k.unsqueeze(2) if k.dim() == 3 else k.transpose(1, 2)
        k = k[:, k.shape[1] - self.n * self.group :]
        return self.grouped(k.movedim(1, -1)).movedim(-1, 1)

    def grouped(self, row: Tensor) -> Tensor:
        """Mean over the patches of each group, along the last dimension."""
        if self.group == 1:
            return row
        if self.runs:
            return row.reshape(*row.shape[:-1], self.n, self.group).mean(-1)
        assert self.patch_grid is not None
        side = math.isqrt(self.group)
        rows, columns = self.patch_grid[0] // side, self.patch_grid[1] // side
        parts = row.reshape(*row.shape[:-1], rows, side, columns, side)
        return parts.mean((-3, -1)).flatten(-2)

    def class_token(self, who: str) -> Tensor:
        """Features of the class token `(B, 1, C)`, to be handed on with the others.

        Raises:
            ZooError: If they were not given.
        """
        return self.need("class_token", who).unsqueeze(1).to(self.features.dtype)


def given(
    features: Tensor,
    signals: Mapping[str, Tensor],
    grid: tuple[int, int] | None = None,
    group: int = 1,
    group_order: str = "raster",
    share: float | None = None,
    square: bool = True,
) -> Given:
    """Check the inputs of a selector.

    Args:
        features: `(B, N, C)`: patches without prefix tokens, or what a merger made of groups.
        signals: By name, see `SIGNALS`.
        grid: Rows and columns of the patches; None takes a square raster, where N allows one.
        group: Patches in each row of `features`.
        group_order: "raster", patches row by row; "runs", the patches of a group one after another.
        share: What was asked for, where it was a share.
        square: Whether a grid that is not given may be taken for a square one.

    Raises:
        ZooError: If shapes do not fit.
    """
    if not isinstance(features, Tensor) or features.dim() != 3 or 0 in features.shape[1:]:
        got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise ZooError(f"features must be (B, N, C), without prefix tokens, got {got}")
    if not features.is_floating_point():
        raise ZooError(f"features must be floating-point numbers, got {features.dtype}")
    if group_order not in ORDERS:
        raise ZooError(f"group_order must be one of {ORDERS}, got {group_order!r}")
    n, side = features.shape[1], math.isqrt(max(group, 0)) if isinstance(group, int) else 0
    if side < 1 or side * side != group:
        raise ZooError(f"group must be 1, 4, 9, ... patches, got {group!r}")
    if grid is None and square and math.isqrt(n * group) ** 2 == n * group:
        grid = (math.isqrt(n * group),) * 2
    elif grid is not None and (len(grid) != 2 or grid[0] * grid[1] != n * group):
        raise ZooError(f"grid must be (rows, columns) of {n * group} patches, got {grid}")
    if grid is not None and (grid[0] % side or grid[1] % side):
        raise ZooError(f"grid {grid} cannot be cut into groups of {side}x{side}")
    if group > 1 and group_order == "raster" and grid is None:
        raise ZooError("groups of a raster need grid=(rows, columns) of the patches")
    rows = None if grid is None else (grid[0] // side, grid[1] // side)
    exact = torch.promote_types(features.dtype, torch.float32)
    checked = {name: _checked(name, value, features, group) for name, value in signals.items()}
    x = features.detach().to(exact)
    return Given(features, x, checked, rows, group, grid, group_order == "runs", share)


def _checked(name: str, value: Tensor, features: Tensor, group: int) -> Tensor:
    batch, n, width = features.shape
    along = {"q": -2, "k": -2, "cls_row": -1, "cls_row_shallow": -1, "column": -1}
    along |= {"column_shallow": -1}
    if not isinstance(value, Tensor):
        raise ZooError(f"{name} must be a tensor {SIGNALS[name]}, got {type(value).__name__}")
    dims = {"q": (3, 4), "k": (3, 4), "start": (1,), "quality": (2,), "groups": (2,)}
    dims |= {"cls_row": (2, 3), "cls_row_shallow": (2, 3), "class_token": (2,)}
    fits = value.dim() in dims.get(name, (2,)) and value.shape[0] == batch
    if fits and name in along:
        fits = value.shape[along[name]] >= n * group
    elif fits and value.dim() == 2:
        fits = value.shape[1] == (width if name == "class_token" else n)
    if not fits:
        of = f"B={batch}, N={n * group}, C={width}"
        raise ZooError(f"{name} must be {SIGNALS[name]} with {of}, got {tuple(value.shape)}")
    if name == "class_token":
        return value  # handed on as it is, with its gradient
    if name in ("start", "groups"):
        if value.is_floating_point() or value.dtype == torch.bool:
            raise ZooError(f"{name} must hold indices from 0, got {value.dtype}")
        return value.to(torch.int64)
    return value.detach().to(torch.promote_types(value.dtype, torch.float32))


def _names(signals: Mapping[str, Tensor]) -> str:
    return ", ".join(sorted(signals)) or "no signals"
