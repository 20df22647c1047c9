"""Fashion-MNIST: 70,000 grey pictures of clothes, 28x28 pixels, ten classes.

The official split, 5,000 of whose 60,000 training images are the validation split: 500 of each
class, drawn once and for all (`zoo.data.draw.stratified` with seed 0).

    train 55,000 · val 5,000 · test 10,000
"""

from __future__ import annotations

import gzip
import os
import zlib
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from zoo.data.draw import stratified
from zoo.errors import ZooError

CLASSES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
#: Where Debian's package dataset-fashion-mnist puts the files.
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
_VALIDATION = 5000
_FILES = {"train": "train", "test": "t10k"}
_ALIASES = {"validation": "val", "valid": "val", "training": "train", "eval": "test"}


class FashionMnist:
    """One split, as PIL images.

    Args:
        split: `train`, `val` or `test`.
        root: Folder of the idx files, compressed or not; None is Debian's, else `data`.
        download: Let torchvision fetch what is not there.

    Raises:
        ZooError: There is no such split, or the files are not there or damaged.
    """

    num_classes = len(CLASSES)
    classes = CLASSES

    def __init__(self, split: str, root: str | None = None, download: bool = False) -> None:
        split = _ALIASES.get(split, split)
        if split not in ("train", "val", "test"):
            raise ZooError(f"fashion_mnist has the splits train, val and test, got {split!r}")
        start = _FILES["test" if split == "test" else "train"]
        folder = _folder(root, download)
        #: What tells these images from those of another split.
        self.origin = f"{folder}/{split}"
        #: What was read.
        self.files = [_file(folder, f"{start}-{kind}") for kind in _KINDS]
        pixels, labels = (_read(path, path.stat().st_mtime_ns) for path in self.files)
        if len(pixels) != len(labels) or pixels.ndim != 3 or labels.ndim != 1:
            raise ZooError(
                f"{folder}: {len(pixels)} images {pixels.shape[1:]} and {len(labels)} labels do "
                "not belong together"
            )
        if split != "test":
            places = np.zeros(len(labels), dtype=bool)
            # Smaller files of the same form have as large a share.
            places[stratified(labels.tolist(), round(len(labels) * _VALIDATION / 60000))] = True
            places = places if split == "val" else ~places
            pixels, labels = pixels[places], labels[places]
        self.pixels, self.labels = pixels, labels.astype(np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.pixels[i]), int(self.labels[i])


_KINDS = ("images-idx3-ubyte", "labels-idx1-ubyte")


def _folder(root: str | None, download: bool) -> Path:
    """The folder that holds the files.

    Raises:
        ZooError: They are nowhere.
    """
    given = DEBIAN if root is None else Path(root).expanduser()
    fetched = (Path("data") if root is None else given) / "FashionMNIST" / "raw"
    for folder in (given, fetched):
        if all(_there(folder, f"{start}-{kind}") for start in _FILES.values() for kind in _KINDS):
            return folder
    remedy = (
        "install Debian's package dataset-fashion-mnist, type data.root=FOLDER with "
        "train-images-idx3-ubyte(.gz) and the three other files, or data.download=true"
    )
    if not download:
        raise ZooError(f"fashion_mnist: no idx files in {given}; {remedy}")
    try:
        from torchvision.datasets import FashionMNIST

        FashionMNIST(str(fetched.parents[1]), download=True)
    except Exception as error:  # of the network, in many forms
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ZooError(f"fashion_mnist cannot be fetched: {reason}; {remedy}") from error
    return fetched


def _there(folder: Path, name: str) -> Path | None:
    # Some archives spell the dot of the original files.
    names = (name, name.replace("-idx", ".idx"))
    found = (folder / f"{one}{end}" for one in names for end in ("", ".gz"))
    return next((path for path in found if path.is_file()), None)


def _file(folder: Path, name: str) -> Path:
    found = _there(folder, name)
    if found is None:  # it went away meanwhile
        raise ZooError(f"{folder}/{name} is not there any more")
    return found


@lru_cache(maxsize=4)
def _read(path: Path, changed: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """An idx file of bytes: two zeros, the type 8, the number of sides, each in 4 bytes.

    Args:
        path: Of the file.
        changed: When it was; another time is another file.
    """
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    except (OSError, EOFError, zlib.error) as error:
        raise ZooError(f"{os.fspath(path)} cannot be read: {error}") from error
    start = 4 + 4 * (data[3] if len(data) > 3 else 0)
    sides = [int.from_bytes(data[at : at + 4], "big") for at in range(4, start, 4)]
    if data[:3] != b"\0\0\x08" or not sides or len(data) - start != np.prod(sides, dtype=int):
        raise ZooError(f"{path} is no idx file of bytes, or cut short")
    return np.frombuffer(data, np.uint8, offset=start).reshape(sides)
