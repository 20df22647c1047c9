"""What is left of an image in the tokens that a selector keeps, without a language model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from reduction.functional.matching import unit
from reduction.selection.base import Selection, Selector
from reduction.selection.registry import pick
from zoo.measure.device import like_weights
from zoo.measure.features import Features
from zoo.measure.growing import Growing
from zoo.model.answers import check_finite
from zoo.model.selecting import SelectingTower

#: A choice by what is said of it: selector and number of tokens.
Choice = tuple[Selector, int]


class Seen(NamedTuple):
    """What choices left of all images.

    Attributes:
        features: Mean of the kept tokens, of every image.
        mean_error: 1 - cosine of a patch to the nearest kept one, mean over the patches, `(N,)`.
        worst_error: The largest of an image, `(N,)`.
    """

    features: Features
    mean_error: Tensor
    worst_error: Tensor


@torch.inference_mode()
def look(
    tower: SelectingTower,
    choices: Mapping[str, Choice],
    batches: Iterable[Sequence[Tensor]],
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    limit: int | None = None,
    name: Callable[[int], str | None] | None = None,
) -> dict[str, Seen]:
    """Run a tower once over images and choose among its tokens in several ways.

    Args:
        tower: Of which one selector, whose signals all choices read.
        choices: By what they are called; None tokens is all.
        batches: Images, labels, and places; without places images are counted as they come.
        device: Where to run.
        dtype: Precision of autocast.
        limit: Stop after so many images.
        name: What an image is called, by its place, for messages.

    Returns:
        By what the choices are called, and under "" all tokens; on the CPU.

    Raises:
        NotFinite: A token holds NaN or infinity.
    """
    tower = tower.to(device).eval()
    found = {what: (Growing(), Growing(), Growing()) for what in ("", *choices)}
    classes, where = Growing(), Growing()
    total = 0
    for images, labels, *rest in batches:
        if limit is not None:
            images, labels = images[: limit - total], labels[: limit - total]
        places = rest[0] if rest else torch.arange(total, total + len(labels))
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            given, _ = tower.given(like_weights(images, tower, device))
            bad = (~given.features.isfinite().flatten(1).all(1)).nonzero()
            if len(bad):
                first = int(bad[0])
                check_finite(
                    given.features[first : first + 1].flatten(1),
                    int(places[first]),
                    "the tower",
                    name,
                )
            kept = {"": (given.features.float().mean(1), *covered(given.x, None))}
            for what, (selector, keep) in choices.items():
                chosen = pick(selector, given, keep)
                kept[what] = (pooled(chosen), *covered(given.x, chosen))
        for what, values in kept.items():
            for part, value in zip(found[what], values, strict=True):
                part.add(value.float())
        classes.add(torch.as_tensor(labels).long())
        where.add(places[: len(labels)])
        total += len(labels)
        if limit is not None and total >= limit:
            break
    labels, places = classes.tensor(), where.tensor()
    seen = {}
    for what, parts in found.items():
        x, mean, worst = (part.tensor() for part in parts)
        seen[what] = Seen(Features(x, labels, places), mean, worst)
    return seen


def pooled(chosen: Selection) -> Tensor:
    """Mean of the tokens that are no padding, `(B, C)`."""
    rows = torch.arange(chosen.features.shape[1], device=chosen.valid.device)
    real = (rows < chosen.valid.unsqueeze(1)).unsqueeze(2)
    return (chosen.features.float() * real).sum(1) / real.sum(1).clamp_min(1)


def covered(x: Tensor, chosen: Selection | None) -> tuple[Tensor, Tensor]:
    """Mean and largest 1 - cosine of the patches to the nearest kept one, `(B,)` each.

    Args:
        x: All tokens, `(B, N, C)`.
        chosen: Among them; None is all.
    """
    if chosen is None:
        none = torch.zeros(x.shape[0], device=x.device)
        return none, none
    x = unit(x.float())
    cosine = x @ x.transpose(1, 2)
    cosine = cosine.masked_fill(~chosen.mask().unsqueeze(1), -1.0)
    gap = (1 - cosine.amax(2)).clamp_min(0)
    return gap.mean(1), gap.amax(1)
