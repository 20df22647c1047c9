"""Position and patch embeddings of files, brought to a model's patch grid and patch size.

A table `(1, P+N, C)` does not say how its N rows were laid out, and timm takes it for a square
where it is not told. Here the grid of the file is told: by the recipe beside the weights, by the
person who loads them, or by what is known of the model.

Another patch size is another architecture, so a patch embedding is resampled only on demand.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from math import isqrt, prod
from typing import Any

from timm.layers import resample_abs_pos_embed, resample_patch_embed
from torch import Tensor, nn

from zoo.errors import BadCheckpoint, ZooError

_log = logging.getLogger(__name__)

Grid = tuple[int, int]
TABLE = "pos_embed"
PATCHES = "patch_embed.proj.weight"
# Tokens in front of the patches, which may have rows of their own.
_PREFIX_TOKENS = ("cls_token", "dist_token", "reg_token")


def own_grid(backbone: Any) -> Grid | None:
    """The grid of a model's position table; None for a model that has no fixed one."""
    # A Jumbo resamples its table on the fly and keeps the grid of the table apart.
    grid = getattr(backbone, "pos_grid", None)
    grid = getattr(getattr(backbone, "patch_embed", None), "grid_size", None) if not grid else grid
    return (int(grid[0]), int(grid[1])) if grid else None


def grid_of(img_size: Any, backbone: Any) -> Grid:
    """Patch grid of an image size.

    Args:
        img_size: A side, or `(height, width)`, in pixels.
        backbone: A model; its patch size counts.

    Raises:
        ZooError: If it is no image size of this model.
    """
    sides = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
    patch = backbone.patch_embed.patch_size
    whole = len(sides) == 2 and all(type(s) is int and s >= p for s, p in zip(sides, patch))  # noqa: B905
    if not whole:
        raise ZooError(
            "img_size is the side, or (height, width), of the images that the weights were trained "
            f"on, at least {patch[0]}x{patch[1]}; got {img_size!r}"
        )
    return sides[0] // patch[0], sides[1] // patch[1]


def without_table(backbone: nn.Module) -> nn.Module:
    """A model that looks as if it had no position table, which timm's conversions then leave.

    The copy is shallow: all other tensors are the model's own.
    """
    twin = copy.copy(backbone)
    twin._parameters = {**backbone._parameters, TABLE: None}
    return twin


def to_grid(
    body: Mapping[str, Tensor], backbone: Any, told: Grid | None, origin: Any
) -> dict[str, Tensor]:
    """Bring the position table of a file to a model's grid.

    Args:
        body: Tensors under the model's names, or those of a plain ViT for a warm start.
        backbone: The model.
        told: Grid of the table in the file; None where nobody told it.
        origin: Where the tensors are from, for messages.

    Raises:
        BadCheckpoint: If the rows are no square, and nobody told their grid.
    """
    table, own, new = body.get(TABLE), getattr(backbone, TABLE, None), own_grid(backbone)
    if table is None or own is None or new is None or table.dim() != 3:
        return dict(body)
    if own.dim() == 3:
        prefix = own.shape[1] - prod(new)
    elif told is not None and table.shape[1] - prod(told) in (0, _prefix_tokens(body)):
        prefix = table.shape[1] - prod(told)
    else:
        return dict(body)  # a LookupViT from a plain ViT of which nothing is known
    rows = table.shape[1] - prefix
    old = told if told is not None and prod(told) == rows else _likely(rows, backbone, new, origin)
    if old == new or rows < 1:
        return dict(body)
    said = "position embedding resampled from {}x{} to {}x{}".format(*old, *new)
    _log.warning("%s: %s", origin, said, extra={"note": said})
    return {**body, TABLE: resample_abs_pos_embed(table, list(new), list(old), prefix)}


def to_patch(
    body: Mapping[str, Tensor], want: Mapping[str, Tensor], origin: Any
) -> dict[str, Tensor]:
    """Resample the patch embedding of a file to a model's patch size, as FlexiViT does.

    Args:
        body: Tensors under the model's names.
        want: The model's tensors.
        origin: Where the tensors are from, for messages.

    References:
        Beyer et al., FlexiViT, arXiv 2212.08013; by timm.
    """
    table, own = body.get(PATCHES), want.get(PATCHES)
    if table is None or own is None or table.dim() != 4 or own.dim() != 4:
        return dict(body)
    old, new = tuple(table.shape[2:]), tuple(own.shape[2:])
    if old == new:
        return dict(body)
    said = "patch embedding resampled from {}x{} to {}x{} pixels".format(*old, *new)
    _log.warning("%s: %s", origin, said, extra={"note": said})
    return {**body, PATCHES: resample_patch_embed(table, list(new))}


def _likely(rows: int, backbone: Any, new: Grid, origin: Any) -> Grid:
    """The grid of a table that nobody told: the model's, its pretrained weights', or a square."""
    side = isqrt(max(rows, 0))
    if prod(new) == rows:
        if new[0] != new[1] and side * side == rows:
            _log.warning(
                "%s: its %d positions are taken for a grid of %dx%d, as the model's; where they "
                "are %dx%d, say so with load_weights(..., img_size=)",
                origin, rows, *new, side, side,
            )  # fmt: skip
        return new
    size = (getattr(backbone, "pretrained_cfg", None) or {}).get("input_size")
    if size is not None:
        grid = grid_of(tuple(size[-2:]), backbone)
        if prod(grid) == rows:
            return grid
    if side * side != rows:
        raise BadCheckpoint(
            f"{origin}: its {rows} positions are no square, and the file does not say their grid; "
            "say the image size that they were trained at: load_weights(..., img_size=(H, W))"
        )
    return side, side


def _prefix_tokens(body: Mapping[str, Tensor]) -> int:
    return sum(body[name].shape[1] for name in _PREFIX_TOKENS if name in body)
