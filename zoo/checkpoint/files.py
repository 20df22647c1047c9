"""Reading and writing tensor files without ever running code that a file brings along.

``.safetensors`` holds nothing but tensors. Files of ``torch.save`` are pickles, so they are only
read with ``weights_only=True``. Every failure becomes a :class:`~zoo.errors.BadCheckpoint` with one
line.
"""

from __future__ import annotations

import argparse
import hashlib
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from zoo.errors import BadCheckpoint

_LFS_POINTER = b"version https://git-lfs"
# An archive may unpack to so many times its size, and always to so much. torch does not compress
# at all; weights hardly get smaller, except for heads that are zero.
_STORED, _COMPRESSED, _ALWAYS = 2, 50, 1 << 28


def file_sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        for chunk in iter(lambda: handle.read(1 << 20), b""):
            digest.update(chunk)
    return digest.hexdigest()


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors as safetensors; equal tensors give equal bytes.

    Tensors that share memory (tied weights) are written once each: safetensors has no aliases.
    """
    seen: set[int] = set()
    plain: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().to("cpu").contiguous()
        storage = tensor.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != tensor.numel() * tensor.element_size():
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        plain[name] = tensor
    save_file(plain, str(path), metadata={"format": "pt"})


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a ``.safetensors`` file.

    Raises:
        BadCheckpoint: the file is missing, cut short, or not a safetensors file.
    """
    _require_content(path)
    try:
        return load_file(str(path), device="cpu")
    except (SafetensorError, OSError, RuntimeError, MemoryError) as error:
        raise BadCheckpoint(
            f"{path}: not a complete safetensors file ({first_line(error)}); "
            "it was cut short or damaged, copy or download it again"
        ) from error


def read_shapes(path: Path) -> dict[str, Tensor]:
    """Names and shapes of a ``.safetensors`` file, as tensors without content.

    Raises:
        BadCheckpoint: as :func:`read_tensors`.
    """
    _require_content(path)
    try:
        with safe_open(str(path), framework="pt") as handle:
            shapes = {name: handle.get_slice(name).get_shape() for name in handle.keys()}  # noqa: SIM118
        return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    except (SafetensorError, OSError, RuntimeError, MemoryError) as error:
        raise BadCheckpoint(
            f"{path}: not a complete safetensors file ({first_line(error)}); "
            "it was cut short or damaged, copy or download it again"
        ) from error


def check_archive(path: Path, compressed: bool = False) -> None:
    """Refuse a zip archive that unpacks to far more than it is.

    Args:
        path: A file; what is no archive passes.
        compressed: Whether files of this kind are compressed.

    Raises:
        BadCheckpoint: it is missing, empty or damaged, or unpacks to too much.
    """
    _require_content(path)
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise BadCheckpoint(
            f"{path}: not a complete weights file ({first_line(error)}); it was cut short or "
            "damaged, copy or download it again"
        ) from error
    size = path.stat().st_size
    if unpacked > _ALWAYS and unpacked > size * (_COMPRESSED if compressed else _STORED):
        raise BadCheckpoint(
            f"{path}: refused, its {size / 1e6:.3g} MB unpack to {unpacked / 1e9:.3g} GB"
        )


def read_any(path: Path) -> Any:
    """Read a weights file of either kind and return what it holds.

    ``.safetensors`` by its ending, everything else as a file of ``torch.save``.
    ``argparse.Namespace`` is let through, because the training scripts of DeiT and its followers
    store their arguments in it and it cannot run anything; it is never looked at.

    Raises:
        BadCheckpoint: the file is missing, cut short, holds pickled code, or is of another kind.
    """
    if path.suffix.lower() == ".safetensors":
        return read_tensors(path)
    check_archive(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"(?:GLOBAL|global) ([\w.]+\.\w+)", str(error))
        if found:
            raise BadCheckpoint(
                f"{path}: refused, it holds pickled code ({found.group(1)}); only tensors and "
                "plain values are read: its author can save the state_dict alone, or safetensors"
            ) from error
        raise BadCheckpoint(
            f"{path}: not a weights file; expected what torch.save or safetensors writes"
        ) from error
    except Exception as error:  # zip reader, legacy reader and EOF all raise different types
        text = first_line(error)
        if "TorchScript" in text:
            raise BadCheckpoint(
                f"{path}: refused, it is a TorchScript archive, which holds code; "
                "expected a state_dict"
            ) from error
        raise BadCheckpoint(
            f"{path}: not a complete weights file ({text}); it was cut short or damaged, "
            "copy or download it again"
        ) from error


def _require_content(path: Path) -> None:
    if not path.is_file():
        raise BadCheckpoint(f"{path}: no such file")
    with open(path, "rb") as handle:
        head = handle.read(len(_LFS_POINTER))
    if not head:
        raise BadCheckpoint(f"{path}: the file is empty")
    if head == _LFS_POINTER:
        raise BadCheckpoint(f"{path}: a Git LFS pointer, not the weights; run `git lfs pull`")


def first_line(error: BaseException) -> str:
    """The first line of an error's message, at most 120 characters."""
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else type(error).__name__
    return text if len(text) <= 120 else text[:117] + "..."
