"""Google's `.npz` files (ViT, AugReg, SigLIP, Big Vision), by timm's own conversion."""

from __future__ import annotations

import copy
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zoo.checkpoint.files import check_archive, first_line
from zoo.errors import BadCheckpoint

_POSITIONS = ("pos_embedding", "Transformer/posembed_input/pos_embedding")
_SIZES = ("embedding/kernel", "head/bias", *_POSITIONS)
_PREFIXES = ("", "opt/target/", "params/", "params/img/")


def read_npz(path: Path, backbone: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a file under timm's names.

    timm converts straight into a model and leaves what it does not find as it was. It is therefore
    given a copy of the model with the file's own classes, patch and grid, in which every number is
    NaN: what is still NaN afterwards was not in the file.

    Args:
        path: The file.
        backbone: The model that it is for.

    Raises:
        BadCheckpoint: If it cannot be read, or is of another architecture.
    """
    check_archive(path, compressed=True)
    load = getattr(backbone, "load_pretrained", None)
    if load is None:
        raise BadCheckpoint(
            f"{path}: {type(backbone).__name__} reads no .npz files; they are those of Google's "
            "vision transformers"
        )
    try:
        with np.load(path, allow_pickle=False) as archive:
            shapes = _shapes(archive)
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise BadCheckpoint(f"{path}: not a complete .npz file ({first_line(error)})") from error
    twin = _twin(backbone, shapes, path)
    try:
        twin.load_pretrained(str(path))  # type: ignore[operator]
    except (KeyError, ValueError, RuntimeError, TypeError, AttributeError, IndexError) as error:
        raise BadCheckpoint(
            f"{path}: not the weights of {type(backbone).__name__} of this size "
            f"({first_line(error)})"
        ) from error
    return {name: value for name, value in twin.state_dict().items() if not value.isnan().all()}


def _shapes(archive: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of the arrays that say how large the model is, by their names without prefix."""
    names = list(archive.files)
    prefix = next((p for p in _PREFIXES if f"{p}embedding/kernel" in names), None)
    if prefix is None:
        raise ValueError("no embedding/kernel: not in the layout of Google's vision transformers")
    found = {n: tuple(archive[prefix + n].shape) for n in _SIZES if prefix + n in names}
    blocks = {
        m[1] for n in names if (m := re.match(rf"{prefix}Transformer/encoderblock_(\d+)/", n))
    }
    scanned = f"{prefix}Transformer/encoderblock/LayerNorm_0/scale"  # Big Vision: all in one
    found["blocks"] = (archive[scanned].shape[0] if scanned in names else len(blocks),)
    return found


def _twin(backbone: Any, shapes: Mapping[str, tuple[int, ...]], path: Path) -> nn.Module:
    depth, [blocks] = len(backbone.blocks), shapes["blocks"]
    if blocks != depth:
        raise BadCheckpoint(f"{path}: the file has {blocks} blocks, the model {depth}")
    twin: Any = copy.deepcopy(backbone)
    positions = next((shapes[name] for name in _POSITIONS if name in shapes), None)
    if positions is not None and twin.pos_embed is not None:
        twin.pos_embed = nn.Parameter(torch.empty(positions))
    if isinstance(twin.head, nn.Linear) or "head/bias" in shapes:
        classes = shapes.get("head/bias", (0,))[0]
        twin.head = nn.Linear(twin.num_features, classes) if classes else nn.Identity()
    kernel, proj = shapes["embedding/kernel"], twin.patch_embed.proj
    if len(kernel) == 4:
        rows, columns, channels, width = kernel
        proj.weight = nn.Parameter(torch.empty(width, channels, rows, columns))
    with torch.no_grad():
        for value in [*twin.parameters(), *twin.buffers()]:
            if value.is_floating_point():
                value.fill_(torch.nan)
    return twin
