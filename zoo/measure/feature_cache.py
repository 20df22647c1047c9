"""Features on disk, so that no model looks at the same images twice.

An entry is a safetensors file called by a digest of everything that features depend on. What is
damaged, or does not say what it should, counts as absent.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import sys
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from zoo.measure.features import Features

# Whose code decides about features.
_CODE = (
    *("reduction", "zoo.adapters", "zoo.model", "zoo.models", "zoo.plugins"),
    *("zoo.data", "zoo.measure"),
)


class Stored(NamedTuple):
    """An entry.

    Attributes:
        features: Of the images that could be read.
        damaged: Names of the others, and what is wrong with them.
    """

    features: Features
    damaged: dict[str, str]


class FeatureCache:
    """A folder of features that does not grow beyond a size.

    Args:
        folder: Made when the first entry is written.
        most: Bytes; what was not used for longest goes first.
    """

    def __init__(self, folder: str | os.PathLike[str], most: int) -> None:
        self.folder, self.most = Path(folder).expanduser(), most

    def path(self, key: str) -> Path:
        """Where an entry lies."""
        return self.folder / f"{key}.safetensors"

    def get(self, key: str) -> Stored | None:
        """An entry, or None; says so on stderr where one is there and cannot be used."""
        path = self.path(key)
        if not path.is_file():
            return None
        try:
            stored = _read(path, key)
        except Exception as error:  # files are damaged in many ways
            reason = " ".join(str(error).split()) or type(error).__name__
            print(f"warning: {path} is damaged ({reason}): computed again", file=sys.stderr)
            return None
        with contextlib.suppress(OSError):  # somebody else's, or removed meanwhile
            os.utime(path)
        return stored

    def put(self, key: str, stored: Stored) -> None:
        """Write an entry; a folder that cannot be written costs a warning."""
        from safetensors.torch import save

        tensors = {k: v.contiguous() for k, v in stored.features._asdict().items()}
        about = {"key": key, "sha256": _digest(tensors), "damaged": json.dumps(stored.damaged)}
        path = self.path(key)
        scratch = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            scratch.write_bytes(save(tensors, about))
            os.replace(scratch, path)
            self._shrink(keep=path)
        except OSError as error:
            with contextlib.suppress(OSError):
                scratch.unlink(missing_ok=True)
            print(
                f"warning: features are not kept: {self.folder}: {error.strerror}", file=sys.stderr
            )

    def _shrink(self, keep: Path) -> None:
        found = []
        for path in self.folder.glob("*.safetensors"):
            with contextlib.suppress(OSError):  # removed by another process meanwhile
                about = path.stat()
                found.append((about.st_mtime, about.st_size, path))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found, key=lambda one: one[0]):
            if total <= self.most:
                return
            if path != keep:
                path.unlink(missing_ok=True)
                total -= size


def _read(path: Path, key: str) -> Stored:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        about = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in Features._fields}
    if about.get("key") != key or about.get("sha256") != _digest(tensors):
        raise ValueError("its contents are not what it says")
    return Stored(Features(**tensors), dict(json.loads(about.get("damaged") or "{}")))


def cache_key(**facts: Any) -> str:
    """A name for everything that features depend on; the code that computes them is among it."""
    facts["code"] = _code()
    text = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:40]


def state_digest(model: nn.Module) -> str:
    """A digest of all weights of a model."""
    state: Mapping[str, Any] = model.state_dict()
    return _digest({name: value for name, value in state.items() if isinstance(value, Tensor)})


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@lru_cache(maxsize=1)
def _code() -> str:
    """A digest of our own code, and the versions of the libraries below it."""
    import timm

    digest = hashlib.sha256(f"{torch.__version__} {timm.__version__}".encode())
    for package in _CODE:
        found = importlib.util.find_spec(package)
        for folder in (found and found.submodule_search_locations) or ():
            for path in sorted(Path(folder).rglob("*.py")):
                digest.update(path.read_bytes())
    return digest.hexdigest()
