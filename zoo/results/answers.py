"""Answers image by image, kept in a row, and paired tests between two rows.

Two models that answer the same images differ by the images that only one of them gets right;
intervals around each accuracy ignore that the others are shared.
"""

from __future__ import annotations

import base64
import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class Paired(NamedTuple):
    """Two models on the same images.

    Attributes:
        first: Images that only the first gets right.
        second: Images that only the second gets right.
        images: All images.
        p: Of McNemar's exact test, two-sided: how probable so unequal numbers are by chance.
    """

    first: int
    second: int
    images: int
    p: float


def packed(right: Sequence[bool]) -> str:
    """Text that holds one bit for every image, in their order.

    >>> unpacked(packed([True, False, True]))
    [True, False, True]
    """
    bits = bytearray((len(right) + 7) // 8)
    for i, one in enumerate(right):
        bits[i // 8] |= bool(one) << i % 8
    return f"{len(right)}:{base64.b64encode(zlib.compress(bytes(bits), 9)).decode()}"


def unpacked(text: str) -> list[bool]:
    """What `packed` was given.

    Raises:
        ValueError: It is no such text.
    """
    count, _, coded = text.partition(":")
    bits = zlib.decompress(base64.b64decode(coded, validate=True))
    if len(bits) != (int(count) + 7) // 8:
        raise ValueError(f"expected {count} answers, got {8 * len(bits)} bits")
    return [bool(bits[i // 8] >> i % 8 & 1) for i in range(int(count))]


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> Paired:
    """Compare two models on the same images.

    Args:
        first: Whether the first model is right, image by image.
        second: The same of the second.

    Raises:
        ValueError: They answered different numbers of images.

    References:
        McNemar, Psychometrika 1947; the exact form is a sign test of the images they differ in.

    >>> mcnemar([True] * 6 + [False], [False] * 6 + [False])
    Paired(first=6, second=0, images=7, p=0.03125)
    """
    if len(first) != len(second):
        raise ValueError(f"expected the same images, got {len(first)} and {len(second)}")
    ours = sum(a and not b for a, b in zip(first, second, strict=True))
    theirs = sum(b and not a for a, b in zip(first, second, strict=True))
    n, few = ours + theirs, min(ours, theirs)
    total, term = 0, 1
    for k in range(few + 1):  # integers: no sum of small numbers loses anything
        total += term
        term = term * (n - k) // (k + 1)
    p = 1.0 if not n else min(1.0, 2 * math.exp(math.log(total) - n * math.log(2)))
    return Paired(ours, theirs, len(first), float(f"{p:.6g}"))


def compared(
    first: Mapping[str, Any], second: Mapping[str, Any], task: str = "accuracy"
) -> Paired | None:
    """The paired test between two rows; None where they do not hold answers to the same images.

    Args:
        first: A row.
        second: Another.
        task: Whose answers: "accuracy", "knn" or "knn_as_dense".
    """
    same = ["dataset", "split", "n_images"]
    if task != "accuracy":
        same += ["gallery", "gallery_split", "n_gallery"]
    ours, theirs = ((row.get("answers") or {}).get(task) for row in (first, second))
    if not ours or not theirs or any(first.get(key) != second.get(key) for key in same):
        return None
    return mcnemar(unpacked(ours), unpacked(theirs))
