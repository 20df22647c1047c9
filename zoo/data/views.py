"""Chosen images, each with its place in the data, and other parts of the same pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from zoo.data.images import Damage, Images

#: `(place, image) -> image`.
Change = Callable[[int, Image.Image], Image.Image]


class Chosen(Dataset[Any]):
    """Some images of a split; an item is image, class and place.

    Args:
        images: The split.
        places: Which of them, in this order.
        change: Applied to each picture before it is resized.
    """

    def __init__(self, images: Images, places: Sequence[int], change: Change | None = None) -> None:
        self.images, self.places, self.change = images, list(places), change

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, i: int) -> Any:
        return self.__getitems__([i])[0]

    def __getitems__(self, numbers: Sequence[int]) -> list[tuple[Any, int, int] | Damage]:
        return [self._item(self.places[i]) for i in numbers]

    def _item(self, place: int) -> tuple[Any, int, int] | Damage:
        change = None if self.change is None else partial(self.change, place)
        item = self.images.item(place, change)
        return item if isinstance(item, Damage) else (*item, place)


class OtherCrop:
    """A smaller part of each picture, somewhere in it.

    Where it lies depends on the seed and the picture's place alone.

    Args:
        share: Side of the part over the side of the picture, in (0, 1].
        seed: Another seed looks elsewhere.
    """

    def __init__(self, share: float = 0.8, seed: int = 0) -> None:
        self.share, self.seed = share, seed

    def __call__(self, place: int, image: Image.Image) -> Image.Image:
        """Return that part of the picture at a place."""
        width, height = (max(1, round(self.share * side)) for side in image.size)
        rng = np.random.default_rng((self.seed, place))
        left = int(rng.integers(0, image.width - width + 1))
        top = int(rng.integers(0, image.height - height + 1))
        return image.crop((left, top, left + width, top + height))
