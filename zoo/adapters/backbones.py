"""Entry and exit of timm's backbones: embedding, rotary table, pooling, head."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from reduction.tokens import Tokens
from zoo.adapters.blocks import block_adapter
from zoo.adapters.standalone import as_standalone
from zoo.errors import UnsupportedModel, ZooError


class Embedded(NamedTuple):
    """What a backbone hands to its first block.

    Attributes:
        x: Tokens `(B, P+N, C)`, before the pre-norm; None once the first block has them.
        rope: Rotary table `(N, 2d)`, `(H, N, 2d)` or batched `(B, 1, N, 2d)`; with a leading
            depth when `mixed`; None without rotary embedding.
        mixed: Whether every block has its own table.
    """

    x: Any
    rope: Tensor | None
    mixed: bool


def _embed_vit(m: nn.Module, images: Tensor) -> Embedded:
    x = m._pos_embed(m.patch_embed(images))
    return Embedded(m.patch_drop(x), None, False)


def _embed_eva(m: nn.Module, images: Tensor) -> Embedded:
    x, rope = m._pos_embed(m.patch_embed(images))
    return Embedded(x, rope, bool(getattr(m, "rope_mixed", False)))


_EMBED = {
    (VisionTransformer.forward_features, VisionTransformer.forward): _embed_vit,
    (Eva.forward_features, Eva.forward): _embed_eva,
}


def check_backbone(m: nn.Module) -> None:
    """Refuse a model that the wrapper would run differently from itself.

    A standalone backbone runs itself, so it is never refused.

    Raises:
        UnsupportedModel: Naming the class and what is supported.
    """
    if as_standalone(m) is not None:
        return
    cls = type(m)
    key = (getattr(cls, "forward_features", None), cls.forward)
    if key not in _EMBED:
        hint = " (a hierarchical or windowed model has no single token sequence to reduce)"
        raise UnsupportedModel(
            f"backbone class {cls.__module__}.{cls.__name__} is not supported{hint}; supported are "
            "timm's VisionTransformer (DeiT, DINOv2, CLIP, SigLIP, MAE, registers, distilled) and "
            "Eva (EVA-02, DINOv3), and subclasses that keep their forward"
        )
    for block in m.blocks:
        block_adapter(block)


def embed(m: nn.Module, images: Tensor) -> Embedded:
    """Patch and position embedding, prefix tokens included."""
    return _EMBED[(type(m).forward_features, type(m).forward)](m, images)


def check_images(m: nn.Module, images: Tensor) -> None:
    """Refuse images that the patch embedding cannot take, in words.

    Raises:
        ZooError: If the shape, channels or size do not fit.
    """
    if images.dim() != 4 or images.shape[1] != m.patch_embed.proj.in_channels:
        raise ZooError(
            f"expected images of shape (B, {m.patch_embed.proj.in_channels}, H, W), "
            f"got {tuple(images.shape)}"
        )
    height, width = images.shape[-2:]
    patch, size = m.patch_embed.patch_size, m.patch_embed.img_size
    strict = m.patch_embed.strict_img_size and size is not None
    if strict and (height, width) != tuple(size):
        raise ZooError(
            f"expected images of {size[0]}x{size[1]}, got {height}x{width}; resize them, or build "
            f"the model with img_size=({height}, {width}) or dynamic_img_size=True"
        )
    if not getattr(m.patch_embed, "dynamic_img_pad", False) and (
        height % patch[0] or width % patch[1]
    ):
        raise ZooError(
            f"image size {height}x{width} is not divisible by the patch size {patch[0]}x{patch[1]}"
        )


def grid_size(m: nn.Module, images: Tensor) -> tuple[int, int]:
    """Patch grid `(rows, columns)` of a batch of images."""
    rows, columns = m.patch_embed.dynamic_feat_size(tuple(images.shape[-2:]))
    return int(rows), int(columns)


def class_tokens(m: nn.Module) -> int:
    """Leading tokens that together act as the class token: 1, or 0 in a model without one.

    A model in which several slots are one wide class token says so in `num_class_tokens`.
    """
    # Asked of the class: a module takes long to say that it lacks something.
    own = m.num_class_tokens if hasattr(type(m), "num_class_tokens") else None
    return int(getattr(m, "cls_token", None) is not None) if own is None else int(own)


def has_class_token(m: nn.Module) -> bool:
    """Whether token 0 is a class token, or part of one."""
    return class_tokens(m) > 0


def pools(m: nn.Module) -> str:
    """What the classifier reads: "class", or "patches" where it pools them."""
    kind = getattr(m, "global_pool", "token")
    return "class" if kind in ("token", "") else "patches"


def rope_for(embedded: Embedded, block: int, t: Tokens, moved: bool) -> Tensor | None:
    """Rotary table of the tokens that are there now.

    Args:
        embedded: From `embed`.
        block: Index of the block.
        t: Current tokens.
        moved: Whether tokens are no longer in their first places.

    Returns:
        A table broadcastable to `(B, H, N, 2d)`, or None. A token without position (origin -1)
        is not rotated.
    """
    rope = embedded.rope
    if rope is None:
        return None
    rope = rope[block] if embedded.mixed else rope
    if not moved:
        return rope
    assert t.origin is not None
    if rope.dim() == 4:
        raise ZooError("patch dropout together with a reducer is not supported for rotary models")
    half = rope.shape[-1] // 2
    still = rope.new_zeros(rope.shape[:-2] + (1, rope.shape[-1]))
    still[..., half:] = 1.0
    table = torch.cat([rope, still], dim=-2)
    index = torch.where(t.origin < 0, table.shape[-2] - 1, t.origin)
    rows = table[..., index, :]  # (B, N, 2d) or (H, B, N, 2d)
    return rows.unsqueeze(1) if rows.dim() == 3 else rows.transpose(0, 1)


def input_size(backbone: nn.Module) -> tuple[int, int, int]:
    """Returns `(channels, height, width)` of the images that a model was built for."""
    embed: Any = backbone.patch_embed
    return (embed.proj.in_channels, *embed.img_size)
