"""Accuracy on the test split, shared out among processes, with what the images have cost."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from zoo.cost.sampling import CostSampler, is_adaptive, patch_counts
from zoo.errors import ZooError
from zoo.measure.accuracy import top_k
from zoo.measure.costs import sampled_costs
from zoo.measure.processes import ALONE, Processes
from zoo.results.answers import packed
from zoo.results.rows import wilson_interval
from zoo.run.costs import has_weights
from zoo.run.shares import Share, measured

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from zoo.data.module import ImageData
    from zoo.model.reduced import ReducedViT
    from zoo.model.stream import Info


class _Counted(NamedTuple):
    """What one process has seen of the images."""

    hits: tuple[int, int, int]
    right: list[bool]
    tokens: list[tuple[tuple[int, int], list[list[int]]]]


def measure_accuracy(
    cfg: DictConfig,
    model: ReducedViT,
    data: ImageData,
    device: torch.device,
    dtype: torch.dtype,
    processes: Processes = ALONE,
) -> dict[str, Any]:
    """Top-1, top-5 and the 95 % interval on the test split of the data.

    Raises:
        NotFinite: The model answers an image with NaN or infinity.
        ZooError: There are no images, or an image has no label.
    """
    if not has_weights(cfg) and processes.rank == 0:
        print(
            "warning: accuracy of untrained weights; give weights=... or backbone.pretrained=true",
            file=sys.stderr,
        )
    model.to(device)
    runner: Any = torch.compile(model) if cfg.compile else model
    answers = bool(cfg.get("answers"))
    # A compiled graph keeps the upper limit, and does not say what it does.
    adaptive = is_adaptive(model) and not cfg.compile

    def count(share: Share) -> _Counted:
        tokens: list[tuple[tuple[int, int], list[list[int]]]] = []
        right: list[bool] = []

        def watch(info: Info) -> None:
            tokens.append((info.grid, patch_counts(info).tolist()))

        hits = top_k(
            runner,
            share.batches(data),
            device,
            dtype,
            limit=share.limit,
            watch=watch if adaptive else None,
            name=share.name,
            note=(lambda hits: right.extend(hits.tolist())) if answers else None,
        )
        return _Counted(hits, right, tokens)

    parts = measured(processes, data, image_limit(cfg.limit), count, lambda part: part.hits[2])
    top1, top5, images = (sum(part.hits[i] for part in parts) for i in range(3))
    if not images:
        unread = f"; {data.damaged}" if data.damaged else ""
        raise ZooError(f"{data.label}: no images in the split {data.splits['test']!r}{unread}")
    return {
        "class_order": data.class_order,
        "n_images": images,
        "top1": 100 * top1 / images,
        # Among five classes or fewer everything is in the first five.
        "top5": 100 * top5 / images if model.num_classes > 5 else None,
        "ci95": list(wilson_interval(top1, images)),
        **({"answers": {"accuracy": packed(parts[0].right)}} if answers else {}),
        **(_costs_of(model, parts) if adaptive else {}),
    }


def _costs_of(model: ReducedViT, parts: Sequence[_Counted]) -> dict[str, Any]:
    """What the images have cost."""
    sampler = CostSampler(model)
    for part in parts:
        for grid, tokens in part.tokens:
            sampler.add_counts(grid, tokens)
    return sampled_costs(sampler.profile())


def image_limit(value: Any) -> int | None:
    """The option `limit`, checked.

    Raises:
        ZooError: It is no whole number from 1.
    """
    if value is not None and (int(value) != value or value < 1):
        raise ZooError(f"limit must be a whole number from 1, or null for all images; got {value}")
    return None if value is None else int(value)
