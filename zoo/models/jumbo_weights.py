"""Reading Jumbo's weight files: what architecture they are of, and which are refused."""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import isqrt
from typing import Any

from timm.layers import resample_abs_pos_embed
from torch import Tensor

from zoo.errors import BadCheckpoint

_FIRST_RELEASE = (
    "weights of Jumbo's first release (February and March 2025; files like "
    "jumbo_small_i1k_finetuned_224.pt), a different architecture: one jumbo MLP per block, "
    "LayerScale, a final norm over the wide token and a head without patches; expected the final "
    "release, jumbo_{pico,nano,tiny,small,base}.pth"
)
# Heads cannot be seen in weights. Width to heads of the official sizes whose heads are 32 wide;
# those of the others are 64 wide.
_HEADS = {96: 3, 128: 4}


def check_release(state: Mapping[str, Tensor], prefix: str = "", unshared: bool = False) -> None:
    """Refuse weights of the first release, whose model is another one.

    Args:
        state: Weights by name.
        prefix: In front of every name.
        unshared: The model that they are for has an MLP for the wide token in every block, as the
            first release has.

    Raises:
        BadCheckpoint: With the reason.
    """
    own_mlp = f"{prefix}blocks.0.jumbo_mlp.fc1.weight" in state
    ours = f"{prefix}jumbo_token" in state
    if f"{prefix}blocks.0.ls1.gamma" in state and (own_mlp or ours):
        raise BadCheckpoint(_FIRST_RELEASE)
    if own_mlp and not ours:
        raise BadCheckpoint(_FIRST_RELEASE)
    if own_mlp and not unshared:
        raise BadCheckpoint(
            "weights with a jumbo MLP in every block; build the model with jumbo_mlp='unshared'"
        )


def infer_args(
    state: Mapping[str, Tensor],
    num_heads: int | None = None,
    img_size: int | tuple[int, int] | None = None,
) -> dict[str, Any]:
    """Find the arguments of `Jumbo` that a state dict fits.

    Args:
        state: Weights by their official names.
        num_heads: Attention heads, which weights do not show. None: as in the official size of
            that width, else 64 features per head.
        img_size: Image size, needed where the patch grid is no square.

    Returns:
        Keyword arguments of `zoo.models.jumbo.Jumbo`.

    Raises:
        BadCheckpoint: First release, or not the weights of a Jumbo, or something cannot be known.
    """
    check_release(state, unshared=True)
    needed = ("jumbo_token", "patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight")
    missing = [key for key in needed if key not in state]
    if missing:
        raise BadCheckpoint(f"not the weights of a Jumbo: {', '.join(missing)} missing")
    _, slots, width = state["jumbo_token"].shape
    patch = state["patch_embed.proj.weight"]
    size = (patch.shape[2], patch.shape[3])
    blocks = {int(m[1]) for key in state if (m := re.match(r"blocks\.(\d+)\.", key))}
    if num_heads is None:
        num_heads = _HEADS.get(width) or (width // 64 if width % 64 == 0 else None)
    if num_heads is None:
        raise BadCheckpoint(f"heads of a width of {width} cannot be guessed; pass num_heads")
    if img_size is None:
        n = state["pos_embed"].shape[1]
        side = isqrt(n)
        if side * side != n:
            raise BadCheckpoint(f"a grid of {n} patches is no square; pass img_size=(H, W)")
        img_size = (side * size[0], side * size[1])
    args: dict[str, Any] = {
        "img_size": img_size,
        "patch_size": size,
        "in_chans": patch.shape[1],
        "num_classes": state["head.weight"].shape[0] if "head.weight" in state else 0,
        "embed_dim": width,
        "depth": len(blocks),
        "num_heads": num_heads,
        "mlp_ratio": state["blocks.0.mlp.fc1.weight"].shape[0] / width,
        "qkv_bias": "blocks.0.attn.qkv.bias" in state,
        "jumbo_tokens": slots,
    }
    return args | _wide_args(state, slots * width)


def _wide_args(state: Mapping[str, Tensor], wide: int) -> dict[str, Any]:
    places = {
        "shared": "jumbo_mlp.fc1.weight",
        "unshared": "blocks.0.jumbo_mlp.fc1.weight",
    }
    kind = next((k for k, key in places.items() if key in state), None)
    if kind is None:
        return {"jumbo_mlp": "none"}
    low = state.get("blocks.0.jumbo_lora.fc1.down.weight")
    return {
        "jumbo_mlp": kind,
        "jumbo_mlp_ratio": state[places[kind]].shape[0] / wide,
        "jumbo_lora": 0 if low is None else low.shape[0],
    }


def _table_grid(
    n: int, patch: tuple[int, int], cfg: Mapping[str, Any] | None
) -> tuple[int, int] | None:
    """Grid of a stored position table: that of the weights' image size, else a square.

    Args:
        n: Rows of the table.
        patch: Patch size.
        cfg: timm's description of the weights, if any.

    Returns:
        `(rows, columns)`, or None where it cannot be known.
    """
    size = (cfg or {}).get("input_size")
    if size is not None:
        grid = (size[1] // patch[0], size[2] // patch[1])
        if grid[0] * grid[1] == n:
            return grid
    side = isqrt(n)
    return (side, side) if side * side == n else None


def checkpoint_filter_fn(state: Mapping[str, Any], model: Any) -> dict[str, Tensor]:
    """Turn an official file, or one of another image size, into weights of this model.

    Args:
        state: A state dict, alone or under "model" or "state_dict".
        model: The Jumbo that it is for.

    Returns:
        The state dict, with the position table on the model's grid.

    Raises:
        BadCheckpoint: If the file is of the first release.
    """
    state = state.get("model", state)
    state = dict(state.get("state_dict", state))
    check_release(state, unshared=model.blocks[0].jumbo_mlp is not None)
    state.setdefault("cls_token", model.cls_token.detach())
    table = state.get("pos_embed")
    if table is not None and model.pos_embed is not None:
        patch = tuple(state["patch_embed.proj.weight"].shape[2:])
        grid = _table_grid(table.shape[1], patch, getattr(model, "pretrained_cfg", None))
        if grid is not None and grid != model.pos_grid:
            state["pos_embed"] = resample_abs_pos_embed(table, list(model.pos_grid), list(grid), 0)
    return state
