"""What evaluation images are called, for messages about one of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING

from zoo.data.images import Images

if TYPE_CHECKING:
    from zoo.data.module import ImageData


def image_names(data: ImageData) -> Callable[[int], str | None]:
    """Returns a function that names the images of the test split by their place, if they are files.

    Places are of the images that could be read.
    """

    def name(place: int) -> str | None:
        images = data.dataset("test")
        if not isinstance(images, Images):
            return None
        left_out = data.damaged.found
        read = (i for i in range(len(images)) if not left_out or images.name(i) not in left_out)
        return images.file(next(itertools.islice(read, place, None)))

    return name
