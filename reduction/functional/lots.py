"""Draws by lot: at random for every image, and the same whenever that image is seen again.

A generator would give an image another draw in another batch, or at another place in it. Here the
draw follows from a seed and from the image's own pixels, in whole numbers: nothing is rounded, so
neither the batch, nor the device, nor an exported graph changes it. Only a runtime that computes
whole numbers in float32, as OpenVINO's does on a CPU, draws others.

Shapes: B images, N tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reduction.errors import ZooError

#: Numbers are drawn below this prime, so that products of two of them fit into int64.
PRIME = 2**31 - 1
_WEIGHTS = 1_048_573  # a prime; the sum of 2**21 values of 15 bits times weights below it fits too
# What is multiplied with places stays below 2**31: compilers compute indices in 32 bits.
_ROW = 65_521
_SCALE, _MOST = 64.0, 2.0**15


def seed_or_torchs(seed: int | None) -> int:
    """The seed, or the one that torch's generator was given last (`torch.manual_seed`) for None.

    Raises:
        ZooError: If it is no whole number.
    """
    if seed is None:
        return torch.initial_seed()
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ZooError(f"seed must be a whole number or None (torch's own), got {seed!r}")
    return seed


def lots(x: Tensor) -> Tensor:
    """A whole number for every image, `(B,)` int64: the same for the same values.

    Args:
        x: `(B, ...)`: images, or whatever stands for them.
    """
    values = (x.flatten(1).float() * _SCALE).nan_to_num(0.0, _MOST, -_MOST)
    whole = values.clamp(-_MOST, _MOST).round().to(torch.int64)
    place = torch.arange(whole.shape[1], device=x.device)
    weight = (place % _ROW * 32_749 + place // _ROW * 101) % _WEIGHTS
    return (whole * weight).sum(1) % PRIME


def ranks(lot: Tensor, n: int, seed: int, round_: int) -> Tensor:
    """A number for each of n places of every image, `(B, n)`, no two equal, each order as likely.

    Args:
        lot: Of `lots`, `(B,)`.
        n: Places.
        seed: Another seed, other numbers.
        round_: For several draws from one lot: another round, other numbers.
    """
    place = torch.arange(n, device=lot.device)
    start = (seed * 1_000_003 + round_ * 40_503 + n * 2_654_435) % PRIME
    x = (lot.unsqueeze(1) + start + place * 7_919) % PRIME
    for factor in (48_271, 69_621, 1_226_874_159):
        x = (x * factor + start) % PRIME
        x = x * x % PRIME
    # Mixed once more, so that the last squares are not what is compared.
    return (x * 62_089_911 + start) % PRIME * n + place


def draw(lot: Tensor, n: int, k: int, seed: int, round_: int) -> Tensor:
    """k of n places for every image, each set of places as likely as any other.

    Args:
        lot: Of `lots`, `(B,)`.
        n: Places.
        k: How many to draw.
        seed: Another seed, another draw.
        round_: For several draws from one lot: another round, another draw.

    Returns:
        `(B, K)` int64, ascending.
    """
    rank = ranks(lot, n, seed, round_)
    return rank.topk(k, dim=1, sorted=False).indices.sort(dim=1).values
