"""How close a model's answers stay to those of the dense model.

Accuracy on few images tells two good reducers apart only by chance. Every image, labelled or not,
tells how far the answers have moved. A model without a classifier answers with features, and these
are compared.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from zoo.adapters.tower import find_tower
from zoo.errors import ZooError
from zoo.measure.device import like_weights
from zoo.model.answers import check_finite
from zoo.model.attached import as_tensors


class Closeness(NamedTuple):
    """Sums over images; those of several parts of the data add up.

    Attributes:
        headless: Whether the model has no classifier.
        images: How many there were.
        same: Those whose first class is that of the dense model.
        divergence: KL(dense || model) in nats.
        cosine: Of the features that enter the classifier.
        angles: Images whose features could be compared.
    """

    headless: bool
    images: int = 0
    same: int = 0
    divergence: float = 0.0
    cosine: float = 0.0
    angles: int = 0

    def plus(self, other: Closeness) -> Closeness:
        """Both together."""
        sums = (a + b for a, b in zip(self[1:], other[1:], strict=True))
        return Closeness(self.headless, *sums)  # type: ignore[arg-type]  # of the same types

    def means(self) -> dict[str, float | int | None]:
        """As rows hold them, see `compare_answers`.

        Raises:
            ZooError: There are no images.
        """
        total = self.images
        if not total:
            raise ZooError("fidelity needs at least one image, got none")
        # Rounding may leave a divergence of zero a little below zero. It is a number: answers
        # were looked at.
        return {
            "agreement": None if self.headless else 100 * self.same / total,
            "kl": None if self.headless else max(0.0, self.divergence / total),
            "cosine": self.cosine / total if self.angles == total else None,
            "n_images": total,
        }


def compare_answers(
    model: nn.Module,
    dense: nn.Module,
    batches: Iterable[Sequence[Tensor]],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    limit: int | None = None,
    name: Callable[[int], str | None] | None = None,
) -> dict[str, float | int | None]:
    """Compares two models image by image.

    Args:
        model: Gives logits `(B, classes)`, or features `(B, C)` where it has no classifier.
        dense: What it should answer like.
        batches: The same images for the one and the other, `(B, C, H, W)` each, and their places
            `(B,)` in the data; without places they are counted as they come.
        device: Where to run.
        dtype: Precision of autocast.
        limit: Stop after so many images.
        name: What an image is called, by its place, for messages.

    Returns:
        `agreement`, percent of images with the same first class; `kl`, KL(dense || model) of the
        answers in nats (both None without a classifier); `cosine` of the features that enter the
        classifier (None where they cannot be told or have another width); `n_images`. All are
        means.

    Raises:
        NotFinite: One of the two answers an image with NaN or infinity.
        ZooError: There are no images, or a model answers with more than one vector per image.
    """
    return closeness(model, dense, batches, device, dtype, limit, name).means()


@torch.inference_mode()
def closeness(
    model: nn.Module,
    dense: nn.Module,
    batches: Iterable[Sequence[Tensor]],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    limit: int | None = None,
    name: Callable[[int], str | None] | None = None,
) -> Closeness:
    """The sums behind `compare_answers`, which takes the same arguments."""
    device = torch.device(device)
    model, dense = (as_tensors(m.to(device).eval()) for m in (model, dense))
    headless = getattr(model, "num_classes", None) == 0
    same = total = angles = 0
    divergence = cosine = 0.0
    for ours, theirs, *rest in batches:
        if limit is not None:
            ours, theirs = ours[: limit - total], theirs[: limit - total]
        places = rest[0] if rest else torch.arange(total, total + len(ours))
        answers, features = _answer(model, like_weights(ours, model, device), dtype)
        expected, wanted = _answer(dense, like_weights(theirs, dense, device), dtype)
        check_finite(answers, places, "the model", name)
        check_finite(expected, places, "the dense model", name)
        if headless:
            features, wanted = answers, expected
        else:
            same += int((answers.argmax(1) == expected.argmax(1)).sum())
            p, q = expected.log_softmax(1), answers.log_softmax(1)
            divergence += float((p.exp() * (p - q)).sum())
        if features is not None and wanted is not None and features.shape == wanted.shape:
            cosine += float(nn.functional.cosine_similarity(features, wanted, dim=1).sum())
            angles += len(answers)
        total += len(answers)
        if limit is not None and total >= limit:
            break
    return Closeness(headless, total, same, divergence, cosine, angles)


def _answer(model: nn.Module, images: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """The answers and the features that entered the classifier, both in double precision."""
    device = images.device.type
    with _watched(model) as seen, torch.autocast(device, dtype, enabled=dtype != torch.float32):
        answers = model(images)
    if answers.ndim != 2:
        raise ZooError(
            "fidelity compares one vector per image, and this model answers with "
            f"{tuple(answers.shape[1:])}; pool its tokens, e.g. +backbone.args.global_pool=avg"
        )
    features = seen[-1] if seen and seen[-1].ndim == 2 else None
    return answers.double(), None if features is None else features.double()


@contextlib.contextmanager
def _watched(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collects what enters the classifier while the block runs."""
    backbone: Any = getattr(model, "backbone", model)
    tower = find_tower(backbone)
    found = None if tower is None else tower.classifier(backbone)
    if tower is None and hasattr(backbone, "get_classifier"):  # any other model with timm's names
        found = backbone.get_classifier()
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
