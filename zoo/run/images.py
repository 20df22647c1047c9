"""What evaluation images are called, for messages about one of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from zoo.data.images import Images

if TYPE_CHECKING:
    from zoo.data.module import ImageData


def image_names(
    data: ImageData, part: str = "test", places: Sequence[int] | None = None
) -> Callable[[int], str | None]:
    """Returns a function that names the images of a split by their place, if they are files.

    Places are of the images that could be read.

    Args:
        data: The data.
        part: As in `ImageData.dataset`.
        places: The images that are measured on; None is all of the split.
    """

    def name(place: int) -> str | None:
        images = data.dataset(part)
        if not isinstance(images, Images):
            return None
        readable = readable_places(data, part, range(len(images)) if places is None else places)
        return images.file(next(itertools.islice(readable, place, None)))

    return name


def readable_places(data: ImageData, part: str, places: Sequence[int]) -> Iterator[int]:
    """Yields those of some places whose images were not found damaged."""
    images, left_out = data.dataset(part), data.damaged.found
    for i in places:
        if not left_out or not isinstance(images, Images) or images.name(i) not in left_out:
            yield i
