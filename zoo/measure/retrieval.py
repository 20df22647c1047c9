"""Images of the same kind, found by their features: recall and average precision."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from zoo.measure.similar import similarities

RECALLS = (1, 5)
# Similarities that are ranked at a time; ranking holds about 40 bytes for each.
_AT_ONCE = 2**22


class Found(NamedTuple):
    """What retrieval found.

    Attributes:
        hits: For each of `RECALLS`, of how many queries something relevant came that early.
        precisions: Average precision of each query, `(queries,)`.
        queries: How many had anything relevant in the gallery; the others are left out.
    """

    hits: tuple[int, ...]
    precisions: Tensor
    queries: int

    @property
    def mean_precision(self) -> float:
        """Mean average precision, from 0 to 1."""
        return float(self.precisions.mean())

    def interval(self) -> tuple[float, float]:
        """95 % interval of the mean average precision, over the draw of queries."""
        if self.queries < 2:
            return 0.0, 1.0
        half = 1.96 * float(self.precisions.std()) / math.sqrt(self.queries)
        return max(0.0, self.mean_precision - half), min(1.0, self.mean_precision + half)


def retrieve(
    queries: Tensor,
    gallery: Tensor,
    wanted: Tensor,
    kinds: Tensor,
    exclude: Tensor | None = None,
) -> Found:
    """Rank the gallery for every query; of equally similar ones the first in the gallery is first.

    Args:
        queries: Features `(Q, C)`.
        gallery: Features `(G, C)`.
        wanted: Of each query, what it looks for, `(Q,)`.
        kinds: Of each in the gallery, what it is, `(G,)`.
        exclude: See `zoo.measure.similar.similarities`; what is excluded is not there.
    """
    hits = [0] * len(RECALLS)
    precisions = []
    for start, cosines in similarities(queries, gallery, exclude, _AT_ONCE):
        order = cosines.argsort(dim=1, descending=True, stable=True)
        relevant = kinds[order] == wanted[start : start + len(order), None]
        relevant &= cosines.gather(1, order) > -torch.inf
        relevant = relevant[relevant.any(1)]
        for i, most in enumerate(RECALLS):
            hits[i] += int(relevant[:, :most].any(1).sum())
        ranks = torch.arange(1, relevant.shape[1] + 1, dtype=torch.double, device=order.device)
        precision = relevant.cumsum(1) / ranks
        precisions.append((precision * relevant).sum(1) / relevant.sum(1))
    found = torch.cat(precisions) if precisions else torch.zeros(0, dtype=torch.double)
    return Found(tuple(hits), found, len(found))
