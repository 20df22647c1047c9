"""Correct answers, counted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from zoo.errors import ZooError
from zoo.measure.device import like_weights
from zoo.measure.progress import bar, batches_of
from zoo.model.answers import check_finite
from zoo.model.attached import as_tensors

if TYPE_CHECKING:
    from zoo.model.stream import Info


@torch.inference_mode()
def top_k(
    model: nn.Module,
    batches: Iterable[Sequence[Tensor]],
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    limit: int | None = None,
    watch: Callable[[Info], None] | None = None,
    name: Callable[[int], str | None] | None = None,
    note: Callable[[Tensor], None] | None = None,
) -> tuple[int, int, int]:
    """Counts correct answers.

    Args:
        model: Gives logits `(B, classes)`.
        batches: Images `(B, C, H, W)`, labels `(B,)`, and places `(B,)` in the data; without
            places images are counted as they come.
        device: Where to run.
        dtype: Precision of autocast; images are of the type of the model's weights.
        limit: Stop after so many images.
        watch: Is told of every batch what happened to its tokens, by a model that can say.
        name: What an image is called, by its place, for messages.
        note: Is told of every batch which classes came first rightly, `(B,)` booleans.

    Returns:
        Images whose class came first, those whose class was among the first five, and all images.

    Raises:
        NotFinite: The model answers an image with NaN or infinity.
        ZooError: An image has no label, or one that is no output of the model.
    """
    top1 = top5 = total = 0
    model = as_tensors(model.eval())
    for images, labels, *rest in bar(batches, "accuracy", batches_of(batches, limit)):
        if limit is not None:
            images, labels = images[: limit - total], labels[: limit - total]
        places = rest[0] if rest else torch.arange(total, total + len(labels))
        images, labels = like_weights(images, model, device), labels.to(device)
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            if watch is None:
                logits, info = model(images), None
            else:
                logits, info = model(images, return_info="trace")
        check_finite(logits, places, name=name)
        _check_labels(labels, logits.shape[1], places)
        if watch is not None and info is not None:
            watch(info)
        best = logits.float().topk(min(5, logits.shape[1]), dim=1).indices
        hits = best == labels[:, None]
        if note is not None:
            note(hits[:, 0])
        top1 += int(hits[:, 0].sum())
        top5 += int(hits.sum())
        total += len(labels)
        if limit is not None and total >= limit:
            break
    return top1, top5, total


def _check_labels(labels: Tensor, classes: int, places: Tensor) -> None:
    """Refuse labels for which there is no right answer: they would all count as wrong."""
    wrong = ((labels < 0) | (labels >= classes)).nonzero()
    if len(wrong):
        place = int(places[wrong[0]])
        label = int(labels[wrong[0]])
        what = "no label" if label < 0 else f"label {label}, the model {classes} outputs"
        raise ZooError(
            f"image {place}, counted from 0, has {what}; accuracy needs a label from 0 to "
            f"{classes - 1} for every image, task=fidelity needs none"
        )
