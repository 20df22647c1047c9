"""Methods with one threshold per block, which unlabelled images can set."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import Tensor, nn

from reduction.checks import listed, number
from reduction.counts import Spec, Step
from reduction.errors import ZooError
from reduction.functional.joining import Decision, Partners, above, best_of_batch
from reduction.mixins.adaptive import Adaptive
from reduction.mixins.learned import Learned
from reduction.tokens import Signals, Tokens

_FOUND = "thresholds"
#: Names of the buffers that calibration sets.
THRESHOLDS = frozenset({"thresholds", "pairs"})


class Partnered:
    """A method that says who would merge, `partners`, and what becomes of those who do, `unite`."""

    def partners(self, t: Tokens, s: Signals, step: Step) -> Partners:
        """Who would merge into whom, and how alike they are."""
        raise NotImplementedError(f"{type(self).__name__} must override partners")

    def unite(self, t: Tokens, s: Signals, step: Step, d: Decision) -> Tokens:
        """Let those merge who do.

        Args:
            t: Tokens.
            s: Signals.
            step: Budget and position.
            d: Who merges.
        """
        raise NotImplementedError(f"{type(self).__name__} must override unite")


class Calibrates(Adaptive, Learned, Partnered):
    """A method whose tokens merge where they are more alike than the threshold of their block.

    Thresholds are a buffer, so they are saved with the model. They are 1 at first, and then nothing
    is alike enough.

    Attributes:
        limit: Never keep more than the schedule says.
        max_r_per_instance_ratio: At most this many times the calibrated count merge in an image.
        capped: At most half of the tokens can merge in one block.
        pairs: Pairs per image that the thresholds were looked for with, `(depth,)`; 0: not yet.
        calibrating: Pairs per image that merge in each block while thresholds are looked for; None
            otherwise. A mode, as training is one.
    """

    limit: bool
    max_r_per_instance_ratio: float | None = None
    capped: ClassVar[bool] = True
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
        super().setup(spec)

    def idle(self, step: Step) -> bool:
        """Whether nothing merges in a block, whatever is there."""
        return self.calibrating is not None and self.calibrating[step.block] == 0

    @torch.no_grad()
    def decided(self, t: Tokens, s: Signals, step: Step) -> tuple[Tokens, Decision]:
        """Who merges: by thresholds, or by counts in calibration, where tokens note thresholds."""
        assert self.thresholds is not None
        p, ratio = self.partners(t, s, step), self.max_r_per_instance_ratio
        if self.calibrating is None:
            keep = step.keep if self.limit else None
            most = self.most(step.block, ratio)
            return t, Decision(p, above(p, self.thresholds[step.block], keep, most), keep)
        r = self.calibrating[step.block]
        pairs = min(r, (t.n + t.prefix - 1) // 2 if self.capped else t.n - 1)
        merged, threshold = best_of_batch(p, pairs, None if ratio is None else int(ratio * r))
        return note_threshold(t, step.block, step.depth, threshold), Decision(p, merged, None)

    def reduce(self, t: Tokens, s: Signals, step: Step) -> Tokens:
        """Merge what is alike enough."""
        if self.idle(step):
            return t
        t, d = self.decided(t, s, step)
        return self.unite(t, s, step, d)

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
