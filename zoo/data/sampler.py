"""The order of the training images, which depends on the seed and the epoch and nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sized
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler


class EpochSampler(DistributedSampler[Any]):
    """Shuffle by (seed, epoch), so that a resumed run sees what an uninterrupted one would.

    It is a DistributedSampler because Lightning leaves those in place on several devices.

    Args:
        data: What is sampled from.
        seed: Of the run.
        rank: Number of this process.
        world_size: Number of processes.
        drop_last: Leave out the images that cannot be shared evenly among the processes.
    """

    def __init__(
        self,
        data: Sized,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = False,
    ) -> None:
        super().__init__(
            data,  # type: ignore[arg-type]  # only its length is used
            num_replicas=world_size,
            rank=rank,
            shuffle=True,
            seed=seed,
            drop_last=drop_last,
        )


class EpochLoader(DataLoader[Any]):
    """A loader whose processes are seeded by the epoch of its `EpochSampler`.

    Args:
        data: The data set.
        sampler: Its order.
        **options: Of torch's DataLoader.
    """

    def __init__(self, data: Dataset[Any], sampler: EpochSampler, **options: Any) -> None:
        super().__init__(data, sampler=sampler, generator=torch.Generator(), **options)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # A generator, so nothing starts before the first batch is asked for. Lightning makes
        # iterators early, before a resumed run knows its epoch, and their processes would have
        # begun on the images of epoch 0.
        sampler = self.sampler
        assert isinstance(sampler, EpochSampler)
        self.generator.manual_seed(epoch_seed(sampler.seed, sampler.epoch, sampler.rank))
        yield from super().__iter__()


def epoch_seed(seed: int, epoch: int, rank: int = 0) -> int:
    """Return a seed for one epoch of one process of one run, far from those of the others."""
    import numpy as np

    return int(np.random.SeedSequence((abs(seed), epoch, rank)).generate_state(1)[0])
