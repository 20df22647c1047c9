"""Classification by the nearest neighbours, weighted as DINO weighs them.

Of each image the k nearest of a gallery vote for their classes, with exp(cosine / temperature).
"""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.errors import ZooError
from zoo.measure.similar import similarities


def knn_classes(
    queries: Tensor,
    gallery: Tensor,
    labels: Tensor,
    k: int = 20,
    temperature: float = 0.07,
    exclude: Tensor | None = None,
) -> Tensor:
    """The class that most votes are for; of equal ones the first.

    Args:
        queries: Features `(Q, C)`.
        gallery: Features `(G, C)`.
        labels: Classes of the gallery, `(G,)`, from 0.
        k: How many neighbours vote.
        temperature: The smaller, the more the nearest of them count.
        exclude: See `zoo.measure.similar.similarities`.

    Returns:
        `(Q,)`.

    Raises:
        ZooError: The gallery has fewer than k images.
    """
    others = len(gallery) - (exclude is not None and bool((exclude >= 0).any()))
    if k > others:
        raise ZooError(
            f"knn.k={k}: expected at most {others}, the number of images to find among; type "
            f"knn.k={max(1, others)}"
        )
    classes = int(labels.max()) + 1
    found = []
    for _, cosines in similarities(queries, gallery, exclude):
        near, places = cosines.topk(k, dim=1)
        # From the nearest on, so that no small temperature makes an infinity of it.
        weights = ((near - near[:, :1]).double() / temperature).exp()
        votes = torch.zeros(len(near), classes, dtype=torch.double, device=near.device)
        votes.scatter_add_(1, labels[places], weights)
        found.append(votes.argmax(1))
    return torch.cat(found) if found else labels.new_zeros(0)
