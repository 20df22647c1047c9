"""timm's NaFlexVit: images of any size, as pixels or as a padded batch of patches of several sizes.

Of a batch of patches, images of one size run together as plain images, without their padding: no
padded token is there that could be kept, merged or attended to, and every image gets the tokens
that it gets alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.layers import apply_keep_indices_nlc
from timm.models.naflexvit import NaFlexVit, batch_patchify
from torch import Tensor, nn

from reduction.eager import traced
from zoo.adapters.heads import register_head
from zoo.adapters.timm_tower import TimmTower, divisible, of_projection
from zoo.adapters.tower import Embedded, Sized, register_tower
from zoo.errors import ZooError


class TimmNaFlex(TimmTower):
    """timm's `NaFlexVit`."""

    title = "timm NaFlexVit"

    def class_tokens(self, m: Any) -> int:
        """See `Tower`."""
        return int(m.embeds.cls_token is not None)

    def input_size(self, m: Any) -> tuple[int, int, int]:
        """See `Tower`: of the images that it was published for, as any size will do."""
        embeds, published = m.embeds, (getattr(m, "pretrained_cfg", None) or {}).get("input_size")
        if embeds.default_img_size is not None:
            height, width = embeds.default_img_size
        elif published:
            height, width = published[1:]
        else:
            grid = embeds.pos_embed_grid_size or (16, 16)
            height, width = (n * p for n, p in zip(grid, embeds.patch_size, strict=True))
        return int(embeds.in_chans), int(height), int(width)

    def grid(self, m: Any) -> tuple[int, int]:
        """See `Tower`."""
        return self._grid(m, self.input_size(m)[1:])

    def grid_of(self, m: Any, images: Tensor) -> tuple[int, int]:
        """See `Tower`."""
        return self._grid(m, (int(images.shape[-2]), int(images.shape[-1])))

    def _grid(self, m: Any, size: tuple[int, int]) -> tuple[int, int]:
        rows, columns = m.embeds.dynamic_feat_size(size)
        return int(rows), int(columns)

    def patch_size(self, m: Any) -> tuple[int, int]:
        """See `Tower`."""
        height, width = m.embeds.patch_size
        return int(height), int(width)

    def check_images(self, m: Any, images: Tensor) -> None:
        """See `Tower`."""
        wanted = int(m.embeds.in_chans)
        if images.dim() != 4 or images.shape[1] != wanted:
            raise ZooError(
                f"expected images of shape (B, {wanted}, H, W), or a mapping with patches, "
                f"patch_coord and patch_valid, got {tuple(images.shape)}"
            )
        if not m.embeds.dynamic_img_pad:
            divisible(images, self.patch_size(m))

    def by_size(self, m: Any, given: Any) -> Sequence[Sized]:
        """See `Tower`: a mapping with `patches`, `patch_coord` and `patch_valid`."""
        if not isinstance(given, Mapping):
            return super().by_size(m, given)
        patches, coord = _patches(m, given)
        valid = given.get("patch_valid")
        valid = patches.new_ones(patches.shape[:2]) if valid is None else valid
        sizes: dict[tuple[int, int], list[int]] = {}
        for i, (own, real) in enumerate(zip(coord.cpu(), valid.bool().cpu(), strict=True)):
            sizes.setdefault(_raster(own, real, i), []).append(i)
        found = []
        for (rows, columns), members in sizes.items():
            index = torch.tensor(members, device=patches.device)
            rest = patches.index_select(0, index)[:, : rows * columns]
            found.append(Sized(index, _images(m, rest, rows, columns)))
        if not found:
            nobody = torch.zeros(0, dtype=torch.long, device=patches.device)
            found.append(Sized(nobody, patches.new_zeros(0, *self.input_size(m))))
        return found

    def embed(self, m: Any, images: Tensor) -> Embedded:
        """See `Tower`."""
        x, grid = m.embeds(images)
        rope, mixed = None, bool(m.rope_is_mixed)
        if m.rope is not None:
            rope = m.rope.get_embed(shape=grid)
        if m.training and m.patch_drop is not None:
            if mixed:
                raise ZooError("patch dropout together with mixed rotary positions is not possible")
            x, keep = m.patch_drop(x)
            if rope is not None:
                rope = apply_keep_indices_nlc(x, rope, keep).unsqueeze(1)
        return Embedded(x, rope, mixed)

    def patches(self, m: Any, images: Tensor) -> Tensor:
        """See `Tower`."""
        e = m.embeds
        if not e.is_linear:
            return e.norm(of_projection(e.proj, images))  # type: ignore[no-any-return]
        order = {"channels_last": e.channels_last} if hasattr(e, "channels_last") else {}
        x = batch_patchify(images, e.patch_size, **order)[0].flatten(2)
        return e.norm(e.proj(x if e.norm_input is None else e.norm_input(x)))  # type: ignore[no-any-return]

    def positions(self, m: Any, grid: tuple[int, int]) -> Tensor:
        """See `Tower`."""
        e = m.embeds
        x: Tensor = e.proj.weight.new_zeros(1, grid[0] * grid[1], self.width(m))
        if e.pos_embed_type == "learned":
            e._apply_learned_pos_embed(x, list(grid))
        elif e.pos_embed_type == "factorized":
            e._apply_factorized_pos_embed(x, list(grid))
        return x

    def stem(self, m: Any) -> nn.Module:
        """See `Tower`."""
        return m.embeds  # type: ignore[no-any-return]

    def stem_of_layers(self, m: Any) -> bool:
        """See `Tower`."""
        return False


def _patches(m: Any, given: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Patches `(B, N, features)` and their coordinates `(B, N, 2)`.

    Raises:
        ZooError: If they are none that a model can be run on size by size.
    """
    patches, coord = given.get("patches"), given.get("patch_coord")
    if not isinstance(patches, Tensor) or not isinstance(coord, Tensor):
        raise ZooError(
            "expected a mapping with the tensors patches, patch_coord and patch_valid, as timm's "
            f"NaFlex loader makes it, got {', '.join(map(str, given)) or 'an empty one'}"
        )
    if given.get("attn_mask") is not None:
        raise ZooError(
            "attn_mask is not possible here: tokens change from block to block; patch_valid says "
            "what is padding"
        )
    if traced():
        raise ZooError("a batch of several sizes cannot be recorded; record with plain images")
    embeds = m.embeds
    if not embeds.is_linear or embeds.pos_embed_use_grid_sample:
        raise ZooError(
            "patches are not possible with embed_proj_type='conv' or pos_embed_use_grid_sample=True"
            "; call the model with images (B, C, H, W)"
        )
    wanted = int(embeds.proj.in_features)
    patches = patches.flatten(2)
    if patches.shape[2] != wanted or coord.shape != (*patches.shape[:2], 2):
        height, width = embeds.patch_size
        raise ZooError(
            f"expected patches (B, N, {wanted}), of {height}x{width} pixels, and patch_coord "
            f"(B, N, 2), got {tuple(patches.shape)} and {tuple(coord.shape)}"
        )
    return patches, coord


def _raster(coord: Tensor, valid: Tensor, place: int) -> tuple[int, int]:
    """Rows and columns of an image, from the coordinates of its patches.

    Raises:
        ZooError: If its patches are not those of a whole raster, row by row, before the padding.
    """
    count = int(valid.sum())
    own = coord[:count]
    rows, columns = (int(n) + 1 for n in own.amax(0)) if count else (0, 0)
    index = torch.arange(count)
    wanted = torch.stack([index // max(1, columns), index % max(1, columns)], dim=1)
    if not count or not valid[:count].all() or rows * columns != count or not own.equal(wanted):
        raise ZooError(
            f"image {place} of the batch: expected the patches of a whole raster, row by row, and "
            "padding behind them; patch dropout of the loader leaves none"
        )
    return rows, columns


def _images(m: Any, patches: Tensor, rows: int, columns: int) -> Tensor:
    """Patches of a whole raster as the images that they were cut from, `(B, C, H, W)`."""
    (height, width), channels = m.embeds.patch_size, m.embeds.in_chans
    if getattr(m.embeds, "channels_last", True):  # the only order that timm 1.0.20 has
        cut = patches.unflatten(2, (height, width, channels)).movedim(4, 2)
    else:
        cut = patches.unflatten(2, (channels, height, width))
    raster = cut.unflatten(1, (rows, columns)).permute(0, 3, 1, 4, 2, 5)
    return raster.reshape(len(patches), channels, rows * height, columns * width)


register_tower(NaFlexVit, TimmNaFlex())
register_head(NaFlexVit)
