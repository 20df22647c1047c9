"""How close a model's answers stay to those of the dense model.

Accuracy on few images tells two good reducers apart only by chance. Every image, labelled or not,
tells how far the answers have moved.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from zoo.errors import ZooError

if TYPE_CHECKING:
    pass


@torch.inference_mode()
def compare_answers(
    model: nn.Module,
    dense: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    limit: int | None = None,
) -> dict[str, float | int | None]:
    """Compares two models image by image.

    Args:
        model: Gives logits `(B, classes)`.
        dense: What it should answer like.
        batches: Pairs of the same images, `(B, C, H, W)` each, for the one and the other.
        device: Where to run.
        dtype: Precision of autocast.
        limit: Stop after so many images.

    Returns:
        `agreement`, percent of images with the same first class; `kl`, KL(dense || model) of the
        answers in nats; `cosine` of the features that enter the classifier (None where they cannot
        be told or have another width); `n_images`. All are means.

    Raises:
        ZooError: There are no images.
    """
    device = torch.device(device)
    model, dense = model.to(device).eval(), dense.to(device).eval()
    same = total = angles = 0
    divergence = cosine = 0.0
    for ours, theirs in batches:
        if limit is not None:
            ours, theirs = ours[: limit - total], theirs[: limit - total]
        logits, features = _answer(model, ours.to(device), dtype)
        expected, wanted = _answer(dense, theirs.to(device), dtype)
        same += int((logits.argmax(1) == expected.argmax(1)).sum())
        p, q = expected.log_softmax(1), logits.log_softmax(1)
        divergence += float((p.exp() * (p - q)).sum())
        if features is not None and wanted is not None and features.shape == wanted.shape:
            cosine += float(nn.functional.cosine_similarity(features, wanted, dim=1).sum())
            angles += len(logits)
        total += len(logits)
        if limit is not None and total >= limit:
            break
    if not total:
        raise ZooError("fidelity needs at least one image, got none")
    return {
        "agreement": 100 * same / total,
        "kl": max(0.0, divergence / total),  # rounding may leave a zero a little below zero
        "cosine": cosine / total if angles == total else None,
        "n_images": total,
    }


def _answer(model: nn.Module, images: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Logits and the features that entered the classifier, both in double precision."""
    device = images.device.type
    with _watched(model) as seen, torch.autocast(device, dtype, enabled=dtype != torch.float32):
        logits = model(images)
    features = seen[-1] if seen and seen[-1].ndim == 2 else None
    return logits.double(), None if features is None else features.double()


@contextlib.contextmanager
def _watched(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collects what enters the classifier while the block runs."""
    backbone: Any = getattr(model, "backbone", model)
    found = backbone.get_classifier() if hasattr(backbone, "get_classifier") else None
    # The distilled models have two; the class token's comes first.
    head = found[0] if isinstance(found, (tuple, list)) else found
    seen: list[Tensor] = []
    if not isinstance(head, nn.Module):
        yield seen
        return
    handle = head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        yield seen
    finally:
        handle.remove()
