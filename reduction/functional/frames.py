"""Patches of a stack of frames that repeat what was there before.

Shapes: B clips, T frames (or tubes of frames), h x w patches, D values in each.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from reduction.functional.matching import unit
from reduction.functional.portable import running_max


class Runs(NamedTuple):
    """What is kept of a clip; places are counted time first, then row, then column.

    Attributes:
        kept: `(B, T * h * w)` bool.
        source: The kept place that stands for each, `(B, T * h * w)`.
        length: Places that each kept one stands for, 0 elsewhere, `(B, T * h * w)`.
    """

    kept: Tensor
    source: Tensor
    length: Tensor


@torch.no_grad()
def static_runs(first: Tensor, last: Tensor, threshold: float) -> Runs:
    """Keep what differs from the same place one step earlier.

    A place of step k is compared with step k - 1, not with what was kept last: slow change goes
    unnoticed. All of the first step is kept.

    Args:
        first: Pixels of the first frame of every step, `(B, T, P, D)`.
        last: Of the last frame, likewise; the same where a step is one frame.
        threshold: Mean distance of pixels up to which nothing has changed.
    """
    batch, steps, places, _ = first.shape
    # int8: tracers know no Boolean to fill with.
    moved = ((last[:, 1:] - first[:, :-1]).abs().mean(-1) > threshold).to(torch.int8)
    kept = torch.cat([torch.ones_like(first[:, :1, :, 0], dtype=torch.int8), moved], dim=1) > 0
    index = torch.arange(steps * places, device=first.device).view(1, steps, places)
    # A place stands for itself and those after it until the next one that is kept.
    source = running_max(torch.where(kept, index, 0)).flatten(1)
    length = torch.zeros_like(source).scatter_add(1, source, torch.ones_like(source))
    return Runs(kept.flatten(1), source, length)


def tubes(clip: Tensor, patch: int, tubelet: int) -> tuple[Tensor, Tensor]:
    """Pixels of the first and of the last frame of every tube, `(B, T / t, P, D)` both.

    Args:
        clip: `(B, 3, T, H, W)`.
        patch: Side of a patch.
        tubelet: Frames in a tube, t.
    """
    batch, channels, frames, height, width = clip.shape
    rows, columns = height // patch, width // patch
    x = clip.reshape(batch, channels, frames // tubelet, tubelet, rows, patch, columns, patch)
    x = x.permute(3, 0, 2, 4, 6, 1, 5, 7).flatten(5).flatten(3, 4)
    return x[0], x[-1]


def evs_count(places: int, frames: int, share_removed: float) -> int:
    """Tokens that Efficient Video Sampling keeps of a clip: never less than one frame's.

    In the arithmetic of the official code: `1 - 0.9` is a little less than a tenth.

    Args:
        places: Tokens of a frame.
        frames: How many.
        share_removed: q, in [0, 1).
    """
    return max(places, int(places * frames * (1 - share_removed)))


def dissimilarity(x: Tensor) -> Tensor:
    """One minus the cosine of a token with the one frame earlier, `(..., T, P)`; 255 in the first.

    Args:
        x: Embeddings `(..., T, P, C)`.
    """
    u = unit(x.to(torch.promote_types(x.dtype, torch.float32)))
    change = 1 - (u[..., 1:, :, :] * u[..., :-1, :, :]).sum(-1)
    return torch.cat([torch.full_like(u[..., :1, :, 0], 255.0), change], dim=-2)
