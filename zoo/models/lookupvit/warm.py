"""Weights from elsewhere: a plain ViT's for a warm start, another image size's positions."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from math import isqrt
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed, resample_abs_pos_embed_nhwc
from torch import Tensor, nn

from zoo.errors import UnsupportedModel

_log = logging.getLogger(__name__)

# What a ViT has and a LookupViT does not need. Its token prefix is left out of the blocks too.
_PREFIX_TOKENS = ("cls_token", "dist_token", "reg_token")
_LEFT_OUT = (*_PREFIX_TOKENS, "head_dist.", "attn_pool.")
_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")
# LayerScale multiplies the output of these layers, so it can be part of their weights.
_SCALED = {"attn.proj": "ls1", "mlp.fc2": "ls2"}


def warm_start(model: nn.Module, vit: nn.Module) -> nn.Module:
    """Start a LookupViT from a plain timm ViT of the same width and depth.

    The patch embedding, the positions (without those of prefix tokens), the blocks (as the
    compressed tokens' blocks), the final norm and, where the classes are as many, the head (as the
    compressed head) are the ViT's. Output projections of gather and infusion and the lookup head
    start at zero. The compressed head then answers exactly as the ViT's blocks, norm and head do
    on the resized grid, without prefix tokens and with average pooling; so does the mean of both
    heads, up to a factor of two. The rest of the model is new.

    Args:
        model: A LookupViT, or a wrapper of one; changed in place.
        vit: A plain VisionTransformer, or a wrapper of one.

    Returns:
        The model.

    Raises:
        UnsupportedModel: The ViT has parts or sizes that the LookupViT cannot take over.
    """
    target = getattr(model, "backbone", model)
    source: Any = getattr(vit, "backbone", vit)
    state = from_vit(source.state_dict(), target, tuple(source.patch_embed.grid_size))
    for name, value in target.state_dict().items():
        if value.shape != state[name].shape:
            raise UnsupportedModel(
                f"a warm start needs a ViT of the same sizes: {name} is {tuple(state[name].shape)} "
                f"there, {tuple(value.shape)} here"
            )
    target.load_state_dict(state)
    return model


def checkpoint_filter_fn(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Make a state dict fit: timm calls this on weights from files.

    Args:
        state: Of a LookupViT, or of a plain ViT for a warm start.
        model: The LookupViT.

    Raises:
        UnsupportedModel: A plain ViT has parts that a LookupViT cannot take over.
    """
    if "blocks.0.attn.qkv.weight" in state:
        _log.warning("warm start from a plain ViT; the cross attention and lookup parts are new")
        return from_vit(state, model)
    table: Any = model.pos_embed
    if "pos_embed" in state and state["pos_embed"].shape != table.shape:
        state = {**state, "pos_embed": resampled(state["pos_embed"], tuple(table.shape[2:]))}
    return state


def resampled(table: Tensor, grid: tuple[int, ...]) -> Tensor:
    """The position table `(1, D, h, w)` for another patch grid, as timm's ViTs resample theirs."""
    found = resample_abs_pos_embed_nhwc(table.permute(0, 2, 3, 1), list(grid))
    return found.permute(0, 3, 1, 2).contiguous()


@torch.no_grad()
def from_vit(
    vit: Mapping[str, Tensor], model: nn.Module, grid: tuple[int, int] | None = None
) -> dict[str, Tensor]:
    """State dict of a LookupViT that starts as a plain ViT; see `warm_start`.

    Args:
        vit: State dict of the ViT.
        model: The LookupViT, which gives what the ViT cannot.
        grid: Patch grid of the ViT; None is the LookupViT's where it has as many patches, else a
            square.

    Raises:
        UnsupportedModel: The ViT has parts that a LookupViT cannot take over.
    """
    state = {name: value.detach().clone() for name, value in model.state_dict().items()}
    for name, value in state.items():
        if name.startswith("head_lookup.") or re.search(r"\.(gather|infuse)\.proj\.", name):
            value.zero_()
        elif re.search(r"\.refine\..*\.bias$", name):
            value.zero_()  # stays where the ViT's layers have no biases
    seen = set()
    for name, value in vit.items():
        if name.startswith(_LEFT_OUT) or re.search(r"\.ls[12]\.gamma$", name):
            continue
        target = _target(name, value, vit, state)
        if target is None:
            continue
        if name == "pos_embed":
            value = _positions(value, vit, tuple(state[name].shape[2:]), grid)
        state[target] = (value * _layer_scale(name, vit, value.dim())).to(state[target].dtype)
        seen.add(target)
    needed = re.compile(r"(patch_embed|pos_embed|norm|fc_norm)\b|blocks\.\d+\.refine\.")
    missing = [
        name
        for name in state
        if needed.match(name) and name not in seen and not name.endswith("bias")
    ]
    if missing:
        raise UnsupportedModel(
            f"a warm start needs a plain ViT of the same depth; nothing there for {missing[0]}"
            + (", build the model with fc_norm=True" if missing[0] == "norm.weight" else "")
        )
    return state


def _target(
    name: str, value: Tensor, vit: Mapping[str, Tensor], state: Mapping[str, Tensor]
) -> str | None:
    """Name in the LookupViT of a ViT's tensor; None for a classifier that does not fit."""
    target = _BLOCK.sub(r"blocks.\1.refine.\2", name)
    if name.startswith("head."):
        pooled = any(key.startswith("attn_pool.") for key in vit)
        fits = target in state and state[target].shape == value.shape and not pooled
        return target if fits else None
    if target in state:
        return target
    hint = ""
    if name.startswith(("norm.", "fc_norm.")):
        hint = f"; build the model with fc_norm={name.startswith('fc_norm.')}"
    raise UnsupportedModel(f"a LookupViT has no place for the ViT's {name}{hint}")


def _layer_scale(name: str, vit: Mapping[str, Tensor], dims: int) -> Tensor | float:
    """What LayerScale multiplies a block's weight or bias with."""
    found = _BLOCK.fullmatch(name)
    layer = found.group(2).rpartition(".")[0] if found else ""
    if found is None or layer not in _SCALED:
        return 1.0
    gamma = vit.get(f"blocks.{found.group(1)}.{_SCALED[layer]}.gamma")
    if gamma is None:
        return 1.0
    return gamma[:, None] if dims == 2 else gamma


def _positions(
    table: Tensor,
    vit: Mapping[str, Tensor],
    grid: tuple[int, ...],
    told: tuple[int, int] | None = None,
) -> Tensor:
    """A ViT's positions `(1, P+N, D)`, or `(1, N, D)`, as a table `(1, D, h, w)`."""
    prefix = sum(vit[name].shape[1] for name in _PREFIX_TOKENS if name in vit)
    length, own = table.shape[1], grid[0] * grid[1]

    def square(n: int) -> bool:
        return isqrt(n) ** 2 == n

    patches = own if told is None else told[0] * told[1]
    first = next((p for p in (prefix, 0) if length - p == patches), None)
    if first is None:
        first = prefix if square(length - prefix) else 0
        told, patches = None, length - first
    old = told or (grid if patches == own else (isqrt(patches), isqrt(patches)))
    found = resample_abs_pos_embed(
        table[:, first:], new_size=list(grid), old_size=list(old), num_prefix_tokens=0
    )
    return found.transpose(1, 2).unflatten(2, grid).contiguous()
