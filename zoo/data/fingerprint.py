"""What tells data from other data, without opening every image."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from zoo.data.images import Images, opened

#: So many images are opened where there are no files to look at.
_LOOKED_AT = 16


def fingerprint(images: Images, places: Sequence[int]) -> str:
    """A digest that changes when images of a split are added, removed, changed or renumbered.

    Of files it covers path, size and time of change, of data in other forms their number, what the
    library says of them, and the pixels of a few.

    Args:
        images: A split.
        places: The images that matter.
    """
    digest = hashlib.sha256(f"{len(images)} {images.numbers}".encode())
    digest.update(np.asarray(places, dtype=np.int64).tobytes())
    labels = images.labels()
    if labels is not None:
        digest.update(np.asarray(labels, dtype=np.int64).tobytes())
    for path in getattr(images.source, "files", ()):  # data that lie in a few large files
        digest.update(_of_file(path))
    for i in places:
        path = images.file(i)
        if path is None or not os.path.isfile(path):
            digest.update(_of_pixels(images, places))
            break
        digest.update(_of_file(path))
    return digest.hexdigest()


def _of_file(path: Any) -> bytes:
    found = os.stat(path)
    return f"{path} {found.st_size} {found.st_mtime_ns}".encode("utf-8", "surrogateescape")


def _of_pixels(images: Images, places: Sequence[int]) -> bytes:
    own = getattr(getattr(images.source, "dataset", None), "_fingerprint", "")  # of Hugging Face
    digest = hashlib.sha256(str(own).encode())
    archive = getattr(getattr(images.source, "tree", None), "file", None)
    if archive is not None:
        digest.update(_of_file(archive))
    for i in places[:: max(1, len(places) // _LOOKED_AT)]:
        try:
            image = opened(images.source[i][0])
        except Exception as error:  # it is left out when its turn comes
            digest.update(type(error).__name__.encode())
            continue
        digest.update(f"{image.mode} {image.size}".encode() + image.tobytes())
    return digest.digest()
