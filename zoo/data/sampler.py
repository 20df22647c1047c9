"""Which images come, and in which order: a matter of the seed, the epoch and the process alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sized
from typing import Any

from torch.utils.data import DistributedSampler


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


class ShareSampler(DistributedSampler[Any]):
    """Every image once, in order, each in one process.

    torch's own sampler repeats images until all processes have as many, and they would count twice.

    Args:
        data: What is sampled from.
        rank: Number of this process.
        world_size: Number of processes.
    """

    def __init__(self, data: Sized, rank: int = 0, world_size: int = 1) -> None:
        super().__init__(
            data,  # type: ignore[arg-type]  # only its length is used
            num_replicas=world_size,
            rank=rank,
            shuffle=False,
        )
        self.count = len(data)

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.rank, self.count, self.num_replicas))

    def __len__(self) -> int:
        return len(range(self.rank, self.count, self.num_replicas))

    @property
    def largest(self) -> int:
        """Length of the largest share."""
        return math.ceil(self.count / self.num_replicas)


def epoch_seed(seed: int, epoch: int, rank: int = 0) -> int:
    """Return a seed for one epoch of one process of one run, far from those of the others."""
    import numpy as np

    return int(np.random.SeedSequence((abs(seed), epoch, rank)).generate_state(1)[0])
