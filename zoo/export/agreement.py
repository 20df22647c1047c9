"""Whether an exported model answers as torch does, where rounding does not decide the answer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

#: Pixels, of standard deviation 1, are moved by this much: some units in the last place.
_STEP = 1e-6
_DRAWS = 8
#: How many times as far as torch from itself an answer may be that rounding decides.
_FACTOR = 4.0


class Agreement(NamedTuple):
    """How an exported model compares with torch.

    Attributes:
        error: Largest difference of a logit, over all images.
        limit: What it may be where rounding decides nothing.
        undecided: Images beyond the limit that torch itself answers as differently when their
            pixels move by a millionth: a choice between two equal tokens is taken by rounding.
        agrees: Whether all other images are within the limit, and these not much further from
            torch than torch is from itself.
    """

    error: float
    limit: float
    undecided: int
    agrees: bool


def compare(
    answer: Callable[[Tensor], Tensor],
    compared: Iterable[tuple[Tensor, Tensor, np.ndarray]],
    tolerance: float | None,
) -> Agreement:
    """Compare an exported model with torch, image by image.

    Methods choose between tokens, and where two are equal but for rounding, e.g. on a white
    background, two right programs choose differently. Such an image says nothing against a graph;
    one that torch answers alike, however its last digits fall, does.

    Args:
        answer: The model in torch, in float32.
        compared: For each batch the images `(B, C, H, W)`, what torch answers to them `(B, N)`, and
            what the exported model does.
        tolerance: Relative to the largest logit where that is above 1; None, for models of another
            precision, lets everything pass that is a number.
    """
    batches = list(compared)
    gaps = [np.abs(found - wanted.numpy()).max(1) for _, wanted, found in batches]
    error = float(np.concatenate(gaps).max())  # unlike Python's `max` NaN if any is
    scale = max(1.0, max(float(wanted.abs().max()) for _, wanted, _ in batches))
    limit = float("inf") if tolerance is None else tolerance * scale
    own: list[float] = []
    for (images, _, _), gap in zip(batches, gaps, strict=True):
        if beyond := np.flatnonzero(~(gap <= limit)).tolist():
            own += _moved(answer, images[beyond]).tolist()
    agrees = all(moved > limit for moved in own) and not error > _FACTOR * max(own, default=limit)
    undecided = sum(moved > limit for moved in own)
    return Agreement(error, limit, undecided, bool(agrees and np.isfinite(error)))


def _moved(answer: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """How far torch's own answers to images go when their pixels move a little, `(B,)`."""
    generator = torch.Generator().manual_seed(0)
    before = answer(images)
    far = before.new_zeros(len(images))
    for _ in range(_DRAWS):
        step = _STEP * torch.randn(images.shape, generator=generator)
        far = torch.maximum(far, (answer(images + step) - before).abs().amax(1))
    return far
