"""What timm's plain vision transformers have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.layers import resample_abs_pos_embed
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn

from reduction.tokens import Tokens
from zoo.adapters.attention import through
from zoo.adapters.heads import head, head_macs, usual_head, weighs
from zoo.adapters.tower import STANDALONE, Tower, register_tower
from zoo.errors import ZooError

#: Why a stem of several layers has no `patches`.
WHY_STEM = "a convolutional stem looks beyond the part of an image that a token is made of"


class TimmTower(Tower):
    """A timm model with `patch_embed`, `blocks`, `norm` and `forward_head`. Subclasses embed."""

    def blocks(self, m: Any) -> Sequence[nn.Module]:
        """See `Tower`, as for all others."""
        return m.blocks  # type: ignore[no-any-return]

    def prefix(self, m: Any) -> int:
        """See `Tower`."""
        return int(m.num_prefix_tokens)

    def class_tokens(self, m: Any) -> int:
        """See `Tower`; where several slots are one wide class token, `num_class_tokens` says so."""
        # Asked of the class: a module takes long to say that it lacks something.
        own = m.num_class_tokens if hasattr(type(m), "num_class_tokens") else None
        return int(getattr(m, "cls_token", None) is not None) if own is None else int(own)

    def width(self, m: Any) -> int:
        """See `Tower`."""
        return int(m.embed_dim)

    def classes(self, m: Any) -> int:
        """See `Tower`."""
        return int(m.num_classes)

    def reads(self, m: Any) -> str:
        """See `Tower`."""
        kind = getattr(m, "global_pool", "token")
        return "class" if kind in ("token", "") else "patches"

    def grid(self, m: Any) -> tuple[int, int]:
        """See `Tower`."""
        rows, columns = m.patch_embed.grid_size
        return int(rows), int(columns)

    def patch_size(self, m: Any) -> tuple[int, int]:
        """See `Tower`."""
        height, width = m.patch_embed.feat_ratio(as_scalar=False)
        return int(height), int(width)

    def grid_of(self, m: Any, images: Tensor) -> tuple[int, int]:
        """See `Tower`."""
        rows, columns = m.patch_embed.dynamic_feat_size(tuple(images.shape[-2:]))
        return int(rows), int(columns)

    def input_size(self, m: Any) -> tuple[int, int, int]:
        """See `Tower`."""
        height, width = m.patch_embed.img_size
        return channels(m), height, width

    def check_images(self, m: Any, images: Tensor) -> None:
        """See `Tower`."""
        check_images(m, images)

    def why_one_piece(self, m: Any) -> str:
        """See `Tower`."""
        return WHY_STEM if self.stem_of_layers(m) else ""

    def patches(self, m: Any, images: Tensor) -> Tensor:
        """See `Tower`."""
        return m.patch_embed.norm(of_projection(m.patch_embed.proj, images))  # type: ignore[no-any-return]

    def positions(self, m: Any, grid: tuple[int, int]) -> Tensor:
        """See `Tower`; tables are resampled as timm does for other image sizes."""
        rows, columns = self.grid(m)
        table = getattr(m, "pos_embed", None)
        if table is None:
            return m.patch_embed.proj.weight.new_zeros(  # type: ignore[no-any-return]
                1, grid[0] * grid[1], self.width(m)
            )
        return of_table(table, (rows, columns), grid)

    def pre_norm(self, m: Any, x: Tensor) -> Tensor:
        """See `Tower`."""
        norm = m._modules.get("norm_pre")
        return x if norm is None else through(norm, x)

    def norm(self, m: Any, x: Tensor) -> Tensor:
        """See `Tower`."""
        return m.norm(x)  # type: ignore[no-any-return]

    def why_all_tokens(self, m: Any) -> str:
        """See `Tower`."""
        distilled = VisionTransformerDistilled.forward_head
        known = usual_head(m) or getattr(type(m), "forward_head", None) is distilled
        if not (known and self.class_tokens(m) and getattr(m, "global_pool", "") == "token"):
            what = "averages over patches" if self.reads(m) == "patches" else "is not a plain one"
            return f"the classifier does not read the class token alone (it {what})"
        if getattr(m, "attn_pool", None) is not None:
            return "the classifier attends to all tokens"
        return ""

    def stem(self, m: Any) -> nn.Module:
        """See `Tower`."""
        return m.patch_embed  # type: ignore[no-any-return]

    def stem_of_layers(self, m: Any) -> bool:
        """See `Tower`."""
        return getattr(m.patch_embed, "backbone", None) is not None

    def head_macs(self, m: Any, tokens: int) -> tuple[int, int]:
        """See `Tower`."""
        return head_macs(m, tokens)

    def classifier(self, m: Any) -> Any:
        """See `Tower`."""
        return m.get_classifier()

    def reset_classifier(self, m: Any, classes: int, pool: str | None = None) -> None:
        """See `Tower`."""
        m.reset_classifier(classes, pool)

    def features(self, m: Any) -> int:
        """See `Tower`."""
        return int(m.num_features)

    def class_embedding(self, m: Any) -> Tensor | None:
        """See `Tower`."""
        return getattr(m, "cls_token", None)

    def places_prefix(self, m: Any) -> bool:
        """See `Tower`."""
        table, (rows, columns) = getattr(m, "pos_embed", None), self.grid(m)
        return table is not None and table.shape[1] > rows * columns

    def after_blocks(self, m: Any) -> tuple[str, ...]:
        """See `Tower`."""
        return ("norm.", "fc_norm.", "head.", "head_dist.", "attn_pool.")

    def set_checkpointing(self, m: Any, enable: bool) -> None:
        """See `Tower`."""
        m.set_grad_checkpointing(enable)

    def groups(self, m: Any, coarse: bool = False) -> dict[str, Any]:
        """See `Tower`."""
        return m.group_matcher(coarse)  # type: ignore[no-any-return]

    def weighs(self, m: Any) -> bool:
        """See `Tower`."""
        return weighs(m)

    def leave(self, m: Any, t: Tokens, pre_logits: bool = False) -> Tensor:
        """See `Tower`."""
        return head(m, t, pre_logits)

    def classify(self, m: Any, x: Tensor, pre_logits: bool = False) -> Tensor:
        """See `Tower`."""
        return type(m).forward_head(m, x, pre_logits=pre_logits)  # type: ignore[no-any-return]


def of_projection(proj: Any, images: Tensor) -> Tensor:
    """Patches `(B, N, C)` by the convolution that makes them."""
    x: Tensor = proj(images)
    return x.flatten(2).transpose(1, 2)


def of_table(table: Tensor, own: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Positions of a grid, `(1, N, C)`, resampled as timm does for other image sizes.

    Args:
        table: Positions of tokens, `(1, N0, C)`; those of the patches are the last ones.
        own: Grid of these patches.
        grid: The grid that is wanted.
    """
    table = table[:, table.shape[1] - own[0] * own[1] :]
    if grid == own:
        return table
    return resample_abs_pos_embed(table, list(grid), list(own), num_prefix_tokens=0)


def channels(m: Any) -> int:
    """Channels of the images; a convolutional stem stands before the projection to patches."""
    if getattr(m.patch_embed, "backbone", None) is None:
        return int(m.patch_embed.proj.in_channels)
    return next(c.in_channels for c in m.patch_embed.modules() if isinstance(c, nn.Conv2d))


def check_images(m: Any, images: Tensor) -> None:
    """Refuse images that timm's patch embedding cannot take, in words.

    Raises:
        ZooError: If the shape, channels or size do not fit.
    """
    wanted = channels(m)
    if images.dim() != 4 or images.shape[1] != wanted:
        raise ZooError(f"expected images of shape (B, {wanted}, H, W), got {tuple(images.shape)}")
    height, width = images.shape[-2:]
    patch, size = m.patch_embed.feat_ratio(as_scalar=False), m.patch_embed.img_size
    strict = m.patch_embed.strict_img_size and size is not None
    if strict and (height, width) == tuple(size):
        return  # also where patches leave a margin, as in SigLIP's 384 with patches of 14
    if strict:
        raise ZooError(
            f"expected images of {size[0]}x{size[1]}, got {height}x{width}; resize them, or build "
            f"the model with img_size=({height}, {width}) or dynamic_img_size=True"
        )
    if not getattr(m.patch_embed, "dynamic_img_pad", False):
        divisible(images, patch)


def divisible(images: Tensor, patch: tuple[int, int]) -> None:
    """Refuse images that patches do not fill.

    Raises:
        ZooError: Naming both sizes.
    """
    height, width = images.shape[-2:]
    if height % patch[0] or width % patch[1]:
        raise ZooError(
            f"image size {height}x{width} is not divisible by the patch size {patch[0]}x{patch[1]}"
        )


register_tower(STANDALONE, TimmTower())
