"""A part of a data set: drawn once and for all, every class by its share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from zoo.data.loader import note

if TYPE_CHECKING:
    from zoo.data.images import Images


def stratified(labels: Sequence[int], count: int, seed: int = 0) -> list[int]:
    """Draw places so that every class has its share.

    The image at place r of the shuffled order of its class with n images gets the key
    (r + 0.5) / n; the `count` smallest keys are drawn. A smaller draw is part of a larger one.

    Args:
        labels: Class of every image.
        count: How many to draw; all of them where there are not so many.
        seed: Another seed draws others.

    Returns:
        Places in ascending order.

    >>> labels = [0] * 60 + [1] * 30
    >>> drawn = stratified(labels, 9)
    >>> sum(labels[i] for i in drawn), set(drawn) <= set(stratified(labels, 50))
    (3, True)
    """
    given = np.asarray(labels)
    rng = np.random.RandomState(seed)
    key = np.empty(len(given))
    for label in np.unique(given):
        members = np.flatnonzero(given == label)
        key[rng.permutation(members)] = (np.arange(len(members)) + 0.5) / len(members)
    order = np.lexsort((given, key))
    return sorted(order[:count].tolist())


def drawn(images: Images, count: int | None, seed: int = 0) -> list[int]:
    """Places of so many images, stratified where the data tell their classes unopened.

    Args:
        images: Of one split.
        count: How many; None is all.
        seed: See `stratified`.
    """
    if count is None or count >= len(images):
        return list(range(len(images)))
    labels = images.labels()
    if labels is None:
        note(
            "these data do not tell the class of an image before it is opened: limits draw from "
            "all images alike, not class by class"
        )
        labels = [0] * len(images)
    return stratified(labels, count, seed)
