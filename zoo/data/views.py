"""The same pictures, seen otherwise: another part of each, chosen by its place in the data."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from zoo.data.images import Damage, Images


class OtherCrop(Dataset[Any]):
    """Pictures of which a smaller part is seen, somewhere in each.

    Where it lies depends on the seed and the picture's place alone.

    Args:
        images: One split.
        share: Side of the part over the side of the picture, in (0, 1].
        seed: Another seed looks elsewhere.
    """

    def __init__(self, images: Images, share: float = 0.8, seed: int = 0) -> None:
        self.images, self.share, self.seed = images, share, seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Any:
        return self.__getitems__([i])[0]

    def __getitems__(self, places: Sequence[int]) -> list[tuple[Any, int] | Damage]:
        return [self.images.item(i, partial(self._part, i)) for i in places]

    def _part(self, i: int, image: Image.Image) -> Image.Image:
        width, height = (max(1, round(self.share * side)) for side in image.size)
        rng = np.random.default_rng((self.seed, i))
        left = int(rng.integers(0, image.width - width + 1))
        top = int(rng.integers(0, image.height - height + 1))
        return image.crop((left, top, left + width, top + height))
