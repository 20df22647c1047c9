"""scikit-learn's bundled handwritten digits: 1,797 real grey images of 8x8 pixels, ten classes.

They come with scikit-learn, so this is the data set that works without any download. The split is
ours (scikit-learn defines none): fixed, stratified by class, and the same on every machine.

    train 1257 · val 180 · test 360

How it is made: `numpy.random.RandomState(0)`, whose stream numpy guarantees never to change,
permutes the images of each class in turn (0 to 9). The image at place r of its class with n images
gets the key (r + 0.5) / n; sorted by key (equal keys by class), the first 360 images are the test
split, the next 180 the validation split, the rest the training split.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from zoo.errors import ZooError

NUM_CLASSES = 10
SIZES = {"test": 360, "val": 180, "train": 1257}
_ALIASES = {"validation": "val", "valid": "val", "training": "train", "eval": "test"}


@lru_cache(maxsize=1)
def _load() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    # 17 grey levels (0 to 16) become the 256 of an ordinary 8-bit image.
    pixels = np.round(bunch.images * (255 / 16)).astype(np.uint8)
    return pixels, bunch.target.astype(np.int64)


@lru_cache(maxsize=1)
def split_indices() -> dict[str, np.ndarray]:
    """Return the image numbers of each split, in ascending order.

    >>> {name: len(index) for name, index in split_indices().items()}
    {'test': 360, 'val': 180, 'train': 1257}
    """
    _, labels = _load()
    rng = np.random.RandomState(0)
    key = np.empty(len(labels))
    for label in range(NUM_CLASSES):
        members = np.flatnonzero(labels == label)
        key[rng.permutation(members)] = (np.arange(len(members)) + 0.5) / len(members)
    order = np.lexsort((labels, key))
    stops = np.cumsum(list(SIZES.values()))
    parts = np.split(order, stops[:-1])
    return {name: np.sort(part) for name, part in zip(SIZES, parts, strict=True)}


class Digits(Dataset[tuple[Any, int]]):
    """The digits of one split, as 8x8 PIL images.

    Args:
        split: `train`, `val` or `test`.
        transform: Applied to each image.
        input_img_mode: PIL mode of the images, `L` (grey) or `RGB`.

    Raises:
        ZooError: there is no such split.
    """

    num_classes = NUM_CLASSES
    classes = tuple(map(str, range(NUM_CLASSES)))

    def __init__(
        self,
        split: str = "train",
        transform: Callable[[Image.Image], Any] | None = None,
        input_img_mode: str = "L",
    ) -> None:
        name = _ALIASES.get(split, split)
        if name not in SIZES:
            raise ZooError(f"digits has the splits train, val and test, got {split!r}")
        pixels, labels = _load()
        #: What tells these images from those of another split.
        self.origin = name
        self.index = split_indices()[name]
        self.labels = labels[self.index]
        self.images = [Image.fromarray(p).convert(input_img_mode) for p in pixels[self.index]]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Any, int]:
        image = self.images[i]
        return (image if self.transform is None else self.transform(image)), int(self.labels[i])
