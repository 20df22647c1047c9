"""Generated pictures of simple shapes: no file, no download, any size. For tests and dry runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from torch.utils.data import Dataset

from zoo.errors import ZooError

SHAPES = (
    "disc",
    "square",
    "triangle",
    "ring",
    "cross",
    "bars",
    "diamond",
    "corner",
    "dots",
    "half",
)
# Splits never share a seed, so no picture of one is in another.
_SPLITS = {"train": 0, "val": 1, "validation": 1, "test": 2}


class Shapes(Dataset[tuple[Any, int]]):
    """Pictures of one shape each, at a random place, size and colour, over noise.

    Image i of a split is the same on every machine and in every run with the same seed.

    Args:
        split: `train`, `val` or `test`.
        length: Number of images; class i % num_classes each, so the split is balanced.
        num_classes: How many of the ten shapes to draw.
        size: Side of the pictures in pixels.
        seed: Another seed gives other pictures.
        transform: Applied to each image.
        input_img_mode: PIL mode of the images, `RGB` or `L`.

    Raises:
        ZooError: there is no such split, or more classes than shapes are asked for.
    """

    def __init__(
        self,
        split: str = "train",
        length: int = 64,
        num_classes: int = 4,
        size: int = 64,
        seed: int = 0,
        transform: Callable[[Image.Image], Any] | None = None,
        input_img_mode: str = "RGB",
    ) -> None:
        if split not in _SPLITS:
            raise ZooError(f"synthetic has the splits train, val and test, got {split!r}")
        if not 1 <= num_classes <= len(SHAPES):
            raise ZooError(
                f"synthetic draws 1 to {len(SHAPES)} classes, got data.num_classes={num_classes}"
            )
        self.split, self.length, self.num_classes = _SPLITS[split], length, num_classes
        #: What tells these images from those of another split.
        self.origin = str(self.split)
        self.classes = SHAPES[:num_classes]
        self.size, self.seed = size, seed
        self.transform, self.mode = transform, input_img_mode

    def __len__(self) -> int:
        return self.length

    @property
    def labels(self) -> list[int]:
        """Class of every picture."""
        return [i % self.num_classes for i in range(self.length)]

    def __getitem__(self, i: int) -> tuple[Any, int]:
        if not 0 <= i < self.length:
            raise IndexError(i)
        label = i % self.num_classes
        image = self._draw(i, SHAPES[label]).convert(self.mode)
        return (image if self.transform is None else self.transform(image)), label

    def _draw(self, i: int, shape: str) -> Image.Image:
        rng = np.random.default_rng((self.seed, self.split, i))
        side = self.size
        image = Image.fromarray(rng.integers(0, 64, (side, side, 3), dtype=np.uint8))
        draw = ImageDraw.Draw(image)
        colour = tuple(int(c) for c in rng.integers(128, 256, 3))
        radius = side * rng.uniform(0.2, 0.35)
        x, y = rng.uniform(radius, side - radius, 2)
        box = (x - radius, y - radius, x + radius, y + radius)
        left, top, right, bottom = box
        width = max(1, int(radius / 3))
        if shape == "disc":
            draw.ellipse(box, fill=colour)
        elif shape == "square":
            draw.rectangle(box, fill=colour)
        elif shape == "triangle":
            draw.polygon([(x, top), (left, bottom), (right, bottom)], fill=colour)
        elif shape == "ring":
            draw.ellipse(box, outline=colour, width=width)
        elif shape == "cross":
            draw.line((left, top, right, bottom), fill=colour, width=width)
            draw.line((left, bottom, right, top), fill=colour, width=width)
        elif shape == "bars":
            for at in (left, x, right):
                draw.line((at, top, at, bottom), fill=colour, width=width)
        elif shape == "diamond":
            draw.polygon([(x, top), (right, y), (x, bottom), (left, y)], fill=colour)
        elif shape == "corner":
            draw.line((left, top, left, bottom, right, bottom), fill=colour, width=width)
        elif shape == "dots":
            for at in (left, right):
                draw.ellipse((at - width, y - width, at + width, y + width), fill=colour)
        else:
            draw.pieslice(box, 0, 180, fill=colour)
        return image
