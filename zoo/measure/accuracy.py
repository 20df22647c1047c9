"""Correct answers, counted."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from zoo.model.answers import check_finite

if TYPE_CHECKING:
    from zoo.model.stream import Info


@torch.inference_mode()
def top_k(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    limit: int | None = None,
    watch: Callable[[Info], None] | None = None,
    name: Callable[[int], str | None] | None = None,
) -> tuple[int, int, int]:
    """Counts correct answers.

    Args:
        model: Gives logits `(B, classes)`.
        batches: Images `(B, C, H, W)` and labels `(B,)`.
        device: Where to run.
        dtype: Precision of autocast.
        limit: Stop after so many images.
        watch: Is told of every batch what happened to its tokens, by a model that can say.
        name: What an image is called, by its place, for messages.

    Returns:
        Images whose class came first, those whose class was among the first five, and all images.

    Raises:
        NotFinite: The model answers an image with NaN or infinity.
    """
    top1 = top5 = total = 0
    model.eval()
    for images, labels in batches:
        if limit is not None:
            images, labels = images[: limit - total], labels[: limit - total]
        images, labels = images.to(device), labels.to(device)
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            if watch is None:
                logits, info = model(images), None
            else:
                logits, info = model(images, return_info="trace")
        check_finite(logits, total, name=name)
        if watch is not None and info is not None:
            watch(info)
        best = logits.float().topk(min(5, logits.shape[1]), dim=1).indices
        hits = best == labels[:, None]
        top1 += int(hits[:, 0].sum())
        top5 += int(hits.sum())
        total += len(labels)
        if limit is not None and total >= limit:
            break
    return top1, top5, total
