"""The cost fields of a result row: counted from shapes, or measured on images."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from zoo.cost.sampling import is_adaptive, sample
from zoo.data.module import IMAGES, spread_images
from zoo.errors import ZooError
from zoo.measure.costs import sampled_costs
from zoo.measure.progress import bar

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from zoo.model.reduced import ReducedViT


def sample_costs(cfg: DictConfig, model: ReducedViT, limit: int | None = None) -> dict[str, Any]:
    """Measures the cost on evaluation images, where it depends on the image and there are any.

    Args:
        cfg: configs/eval.yaml, composed.
        model: The model.
        limit: How many images at most; None is a sample from all over them.

    Returns:
        Fields of the row; none of them for other methods, for untrained weights, and under
        torch.compile, whose graph keeps the upper limit.
    """
    if not is_adaptive(model) or cfg.compile or not has_weights(cfg):
        return {}
    from zoo.data import build_data

    try:
        data = build_data(cfg, model)
        data.setup("test")
        batches = bar(spread_images(data, limit or IMAGES), "cost")
        return sampled_costs(sample(model, batches))
    except ZooError as error:
        print(f"warning: the cost is the schedule's upper limit: {error}", file=sys.stderr)
        return {}


def has_weights(cfg: DictConfig) -> bool:
    """Whether anything but random numbers is evaluated."""
    return cfg.weights is not None or bool(cfg.backbone and cfg.backbone.pretrained)
