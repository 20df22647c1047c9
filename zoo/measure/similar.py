"""Features compared with a gallery of features, in pieces that fit into memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import normalize

#: So many similarities at a time: 64 MiB in float32.
_AT_ONCE = 2**24


def similarities(
    queries: Tensor, gallery: Tensor, exclude: Tensor | None = None, at_once: int = _AT_ONCE
) -> Iterator[tuple[int, Tensor]]:
    """Cosines of queries with all of a gallery.

    Args:
        queries: `(Q, C)`.
        gallery: `(G, C)`.
        exclude: Of each query the place in the gallery of the image itself, -1 for none, `(Q,)`;
            it gets minus infinity.
        at_once: Similarities that are held at a time.

    Yields:
        Number of the first query, and similarities `(B, G)`.
    """
    gallery = normalize(gallery.float(), dim=1)
    step = max(1, at_once // max(1, len(gallery)))
    for start in range(0, len(queries), step):
        block = normalize(queries[start : start + step].float(), dim=1) @ gallery.T
        if exclude is not None:
            own = exclude[start : start + step]
            rows = (own >= 0).nonzero()[:, 0]
            block[rows, own[rows]] = -torch.inf
        yield start, block


def centred_cosine(features: Tensor, dense: Tensor, centre: Tensor) -> Tensor:
    """Cosine of each image's features with the dense model's, both seen from the dense mean.

    Features of all images share a large part that says nothing of any one of them; without it the
    cosine tells how much of what tells images apart is left.

    Args:
        features: `(N, C)`.
        dense: `(N, C)`.
        centre: The dense model's mean feature over a gallery, `(C,)`.

    Returns:
        `(N,)`, in double precision.
    """
    centre = centre.double()
    ours, theirs = features.double() - centre, dense.double() - centre
    return torch.nn.functional.cosine_similarity(ours, theirs, dim=1)
