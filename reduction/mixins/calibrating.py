"""Methods with one threshold per block, which unlabelled images can set."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from reduction.checks import listed, number
from reduction.counts import Spec
from reduction.errors import ZooError
from reduction.mixins.adaptive import Adaptive
from reduction.mixins.learned import Learned
from reduction.tokens import Tokens

_FOUND = "thresholds"


class Calibrates(Adaptive, Learned):
    """A method whose tokens merge where they are more alike than the threshold of their block.

    Thresholds are a buffer, so they are saved with the model. They are 1 at first, and then nothing
    is alike enough.

    Attributes:
        limit: Never keep more than the schedule says.
        pairs: Pairs per image that the thresholds were looked for with, `(depth,)`; 0: not yet.
        calibrating: Pairs per image that merge in each block while thresholds are looked for; None
            otherwise. A mode, as training is one.
    """

    limit: bool
    thresholds: Tensor | None
    pairs: Tensor | None
    calibrating: tuple[int, ...] | None = None

    def together(self) -> bool:
        """While thresholds are looked for, the pairs of a whole batch are ranked."""
        return self.calibrating is not None

    def no_thresholds_yet(self) -> None:
        """Register the buffers, empty until `setup`; called once by a constructor."""
        assert isinstance(self, nn.Module)
        self.register_buffer("thresholds", None)
        self.register_buffer("pairs", None)

    def most(self, block: int, ratio: float | None) -> Tensor | None:
        """At most so many times the pairs that a threshold was looked for with, or None."""
        if ratio is None or self.pairs is None:
            return None
        pairs = self.pairs[block]
        return torch.where(pairs > 0, (pairs * ratio).long(), torch.iinfo(torch.int64).max)

    def setup(self, spec: Spec) -> None:
        """One threshold per block, unless they are there."""
        if self.thresholds is None or len(self.thresholds) != spec.depth:
            self.thresholds = torch.ones(spec.depth)
            self.pairs = torch.zeros(spec.depth, dtype=torch.int64)

    def set_thresholds(
        self, values: Sequence[float] | Tensor, pairs: Sequence[int] | None = None
    ) -> None:
        """Take thresholds, and let them alone decide: `limit` becomes false.

        Args:
            values: One per block.
            pairs: Pairs per image that they were looked for with.

        Raises:
            ZooError: If there is not one number for every block.
        """
        assert self.thresholds is not None
        found = values.tolist() if isinstance(values, Tensor) else listed("thresholds", values)
        if len(found) != len(self.thresholds):
            raise ZooError(
                f"thresholds must hold one number for each of the {len(self.thresholds)} blocks, "
                f"got {len(found)}"
            )
        for value in found:
            number("thresholds", value)
        device = self.thresholds.device
        self.thresholds = torch.tensor(found, device=device, dtype=torch.float32)
        self.pairs = torch.tensor(list(pairs or [0] * len(found)), device=device)
        self.limit = False

    @contextmanager
    def looking(self, r: Sequence[int]) -> Iterator[None]:
        """Merge by counts over the whole batch meanwhile, and note the thresholds they mean."""
        self.calibrating = tuple(r)
        try:
            yield
        finally:
            self.calibrating = None


class TakesThresholds:
    """A method that merges by counts, and of which there is a form that merges by thresholds."""

    def thresholded(self) -> Calibrates:
        """A new reducer that pairs tokens likewise, with thresholds in place of counts.

        Raises:
            ZooError: If some argument has no meaning there.
        """
        raise NotImplementedError(f"{type(self).__name__} must override thresholded")


def note_threshold(t: Tokens, block: int, depth: int, threshold: Tensor) -> Tokens:
    """Remember what the threshold of a block would have been for this batch."""
    found = t.memory.get(_FOUND)
    if found is None:
        found = torch.ones(depth, device=t.x.device)
    place = torch.tensor([block], device=t.x.device)
    found = found.index_copy(0, place, threshold.to(found.dtype).reshape(1))
    return t._replace(memory={**t.memory, _FOUND: found})


def noted_thresholds(t: Tokens, depth: int) -> Tensor:
    """Thresholds that were noted, `(depth,)`; 1 in blocks where nothing merged."""
    found = t.memory.get(_FOUND)
    return torch.ones(depth, device=t.x.device) if found is None else found
