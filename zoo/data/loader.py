"""Batches of images: what cannot be read is named and left out, what can be is counted once."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from zoo.data.images import Damage
from zoo.data.sampler import EpochSampler, ShareSampler, epoch_seed
from zoo.errors import ZooError

#: Label of an image that is none: it fills a batch that a process has less than the others.
NO_IMAGE = -100


class Batch(NamedTuple):
    """What a loader process hands over.

    Attributes:
        good: Images (B, C, H, W) and labels (B,); None where nothing could be read.
        damaged: Name of each other image, and what is wrong with it.
    """

    good: list[Tensor] | None
    damaged: list[tuple[str, str]]


def collate(items: Sequence[Any]) -> Batch:
    """Make a batch of what could be read."""
    good = [item for item in items if not isinstance(item, Damage)]
    damaged = [(item.name, item.reason) for item in items if isinstance(item, Damage)]
    return Batch(default_collate(good) if good else None, damaged)


class Damaged:
    """The images of a data set that could not be read.

    Args:
        fatal: Whether the first one ends the run.
    """

    def __init__(self, fatal: bool = False) -> None:
        self.fatal = fatal
        self.found: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self.found)

    def __str__(self) -> str:
        return f"{len(self)} image{'' if len(self) == 1 else 's'} could not be read"

    def add(self, name: str, reason: str, aloud: bool = True) -> None:
        """Name an image.

        Args:
            name: Its file, or its place in the data.
            reason: What is wrong with it.
            aloud: Whether to say so; not where another process does.

        Raises:
            ZooError: Where damage is fatal.
        """
        if self.fatal:
            raise ZooError(f"{name}: {reason}; type data.damaged=skip to leave such images out")
        self.found[name] = reason
        if aloud:
            say(f"warning: left out {name}: {reason}")


@functools.cache
def say(line: str) -> None:
    """Print a line on stderr, once however often it is said."""
    print(line, file=sys.stderr, flush=True)


@rank_zero_only
def note(text: str) -> None:
    """Say something of the data, by the first of several processes."""
    say(f"note: {text}")


class ImageLoader(DataLoader[Any]):
    """A loader that leaves out what cannot be read, in this process and in others.

    Args:
        dataset: An item may be a `Damage`.
        damaged: Is told of every damaged image.
        **options: Of torch's DataLoader.
    """

    def __init__(self, dataset: Dataset[Any], damaged: Damaged, **options: Any) -> None:
        super().__init__(dataset, **{"collate_fn": collate, **options})
        self.damaged = damaged

    def readable(self) -> Iterator[list[Tensor] | None]:
        """Every batch as [images, labels], None in the place of one without a readable image."""
        for good, damaged in super().__iter__():
            for name, reason in damaged:
                self.damaged.add(name, reason)
            yield good

    # A generator, so that nothing starts before the first batch is asked for.
    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # torch names its own iterator
        yield from (batch for batch in self.readable() if batch is not None)


class EvalLoader(ImageLoader):
    """Every image of this process's share, once.

    All processes of a distributed run get the same number of batches, or some would wait for the
    others for ever; what one has less is filled with batches of one blank image, labelled
    `NO_IMAGE`.

    Args:
        dataset: The data set.
        damaged: See `ImageLoader`.
        sampler: The share of this process.
        image_size: Of the blank image, (C, H, W).
        **options: Of torch's DataLoader.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        damaged: Damaged,
        sampler: Sampler[int],
        image_size: Sequence[int],
        **options: Any,
    ) -> None:
        super().__init__(dataset, damaged, sampler=sampler, **options)
        self.image_size, self.processes = tuple(image_size), 1
        self._batches = super().__len__()
        if isinstance(sampler, ShareSampler):  # not where Lightning is to overfit a few batches
            self.processes = sampler.num_replicas
            self._batches = math.ceil(sampler.largest / (self.batch_size or 1))

    def __len__(self) -> int:
        return self._batches

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        missing = len(self)
        for batch in super().__iter__():
            missing -= 1
            yield batch
        if self.processes > 1:
            yield from (blank(self.image_size) for _ in range(missing))


def blank(image_size: Sequence[int]) -> list[Tensor]:
    """A batch of one image that is none."""
    return [torch.zeros(1, *image_size), torch.full((1,), NO_IMAGE)]


class EpochLoader(ImageLoader):
    """A training loader whose processes are seeded by the epoch of its `EpochSampler`.

    It gives as many batches as it says, which Lightning counts on. One without a readable image is
    made up for by dividing another in two.

    Args:
        dataset: The data set.
        damaged: See `ImageLoader`.
        sampler: Its order.
        **options: Of torch's DataLoader.
    """

    def __init__(
        self, dataset: Dataset[Any], damaged: Damaged, sampler: Sampler[int], **options: Any
    ) -> None:
        super().__init__(dataset, damaged, sampler=sampler, generator=torch.Generator(), **options)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # Lightning makes iterators early, before a resumed run knows its epoch, and their processes
        # would have begun on the images of epoch 0: so this too starts with the first batch.
        sampler = self.sampler
        if isinstance(sampler, EpochSampler):  # not where Lightning is to overfit a few batches
            self.generator.manual_seed(epoch_seed(sampler.seed, sampler.epoch, sampler.rank))
        # Batches that are still to be made up for. The last ones have none after them to divide,
        # and waiting for the next batch would change what the random numbers are used for.
        tail = missing = self._unreadable_at_end()
        for place, batch in enumerate(self.readable()):
            if batch is None:
                missing += place < len(self) - tail
                continue
            parts = _divided(batch, missing + 1)
            missing -= len(parts) - 1
            yield from parts
        if missing:
            raise ZooError(
                f"too many images of a training epoch cannot be read ({len(self.damaged)} so far) "
                f"for batches of {self.batch_size}; remove them, or type a larger data.batch_size"
            )

    def _unreadable_at_end(self) -> int:
        readable = getattr(self.dataset, "readable", None)
        if readable is None or self.batch_sampler is None:
            return 0
        count = 0
        for batch in reversed(list(self.batch_sampler)):
            if any(readable(i) for i in batch):
                break
            count += 1
        return count


def _divided(batch: list[Tensor], most: int) -> list[list[Tensor]]:
    """A batch in at most so many parts."""
    images, labels = batch
    parts = min(most, len(labels))
    if parts == 1:
        return [batch]
    pairs = zip(images.tensor_split(parts), labels.tensor_split(parts), strict=True)
    return [list(pair) for pair in pairs]


class StreamLoader(ImageLoader):
    """Streamed evaluation data: every process reads all of it and counts its share.

    How much there is to come nobody knows, so processes take whole batches in turns, and none has
    one more than the others: see `EvalLoader`.

    Args:
        dataset: The data set.
        damaged: See `ImageLoader`.
        rank: Number of this process.
        processes: How many there are.
        image_size: Of the blank image, (C, H, W).
        **options: Of torch's DataLoader.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        damaged: Damaged,
        rank: int,
        processes: int,
        image_size: Sequence[int],
        **options: Any,
    ) -> None:
        super().__init__(dataset, damaged, **options)
        self.rank, self.processes, self.image_size = rank, processes, tuple(image_size)

    def __len__(self) -> int:
        # Several loader processes each end with a smaller batch; what a stream says is too few.
        raise TypeError("nobody knows how many batches a stream has")

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        count = 0
        for batch in super().__iter__():
            if count % self.processes == self.rank:
                yield batch
            count += 1
        if 0 < count % self.processes <= self.rank:
            yield blank(self.image_size)
