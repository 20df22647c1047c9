"""The images of the tested split, shared out among processes; each counts once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch
from torch import Tensor

from zoo.data.images import Images
from zoo.measure.processes import Processes
from zoo.run.images import image_names

if TYPE_CHECKING:
    from zoo.data.module import ImageData

T = TypeVar("T")


class Share(NamedTuple):
    """What one process looks at.

    Attributes:
        batches: Of the data and of the same data as another model takes them; images and labels,
            and places where the images are a part of all.
        limit: How many images at most.
        name: What an image is called, by its place, for messages.
    """

    batches: Callable[[ImageData], Iterable[Sequence[Tensor]]]
    limit: int | None
    name: Callable[[int], str | None]


def measured(
    processes: Processes,
    data: ImageData,
    limit: int | None,
    measure: Callable[[Share], T],
    images: Callable[[T], int],
) -> list[T]:
    """Measures in all processes.

    Args:
        processes: This one and the others.
        data: After `setup("test")`.
        limit: How many images are wanted; None is all.
        measure: Is given the share of this process, more than once where images cannot be read.
        images: How many images a result is of.

    Returns:
        The results of all processes, in each of them.
    """
    if processes.size == 1:
        return [measure(Share(lambda d: d.test_dataloader(), limit, image_names(data)))]
    whole = data.dataset("test")
    found: list[T] = []
    if not isinstance(whole, Images):
        share = Share(partial(streamed, processes=processes, limit=limit), None, lambda _: None)
        found = processes.collect(partial(measure, share))
    else:
        # Nobody knows which images can be read: the first ones are tried, and then as many more
        # as were missing.
        start, missing = 0, len(whole) if limit is None else limit
        while missing and start < len(whole):
            stop = min(len(whole), start + missing)
            share = Share(partial(_chosen, processes.share(range(start, stop))), None, whole.file)
            parts = processes.collect(partial(measure, share))
            missing -= sum(map(images, parts))
            found, start = found + parts, stop
    tell_damage(processes, data)
    return found


def tell_damage(processes: Processes, data: ImageData) -> None:
    """Lets every process know of the images that others could not read."""
    for damaged in processes.collect(lambda: data.damaged.found):
        data.damaged.found.update(damaged)


def _chosen(places: Sequence[int], data: ImageData) -> Iterable[Sequence[Tensor]]:
    return data.chosen_dataloader("test", places)


def streamed(
    data: ImageData, processes: Processes, limit: int | None = None, part: str = "test"
) -> Iterator[Sequence[Tensor]]:
    """Batches of a stream that fall to one process; all of them read the whole of it.

    Args:
        data: Of which split.
        processes: This one and the others.
        limit: How many images of the stream; None is all.
        part: As in `ImageData.dataset`.
    """
    seen = 0
    for number, (images, labels) in enumerate(data.chosen_dataloader(part)):
        if limit is not None:
            images, labels = images[: limit - seen], labels[: limit - seen]
        if number % processes.size == processes.rank:
            yield images, labels, torch.arange(seen, seen + len(labels))
        seen += len(labels)
        if limit is not None and seen >= limit:
            return
