"""The cost fields of a result row: counted from shapes, or measured on images."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch

from zoo.errors import ZooError
from zoo.sampling import IMAGES, is_adaptive, measure, spread_images

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from zoo.cost import Profile
    from zoo.reduced import ReducedViT


def count_costs(model: ReducedViT, trace: bool = True) -> dict[str, Any]:
    """Returns tokens, parameters and GMACs, of the model and of its dense counterpart.

    Args:
        model: The model.
        trace: Let fvcore count too, which runs one image through the model.
    """
    from zoo import flops

    found = flops.profile(model)
    return {
        **_costs(found),
        "params_m": found.params / 1e6,
        "gmacs_dense": found.dense,
        "gmacs_paper": _as_published(model),
        "gmacs_fvcore": _fvcore(model) if trace else None,
    }


def _costs(found: Profile) -> dict[str, Any]:
    """The fields that differ between an upper limit and a mean over images."""
    return {
        "tokens": [list(pair) for pair in found.tokens],
        "gmacs": {
            "total": found.gmacs,
            "linear": found.linear,
            "attention": found.attention,
            "reducer": found.reducer,
        },
        "gmacs_sample": None if found.sample is None else found.sample._asdict(),
    }


def sampled_costs(found: Profile) -> dict[str, Any]:
    """Returns the fields of a row that a cost measured on images replaces.

    fvcore follows one graph for all images, so its count is none of these.
    """
    return {**_costs(found), "gmacs_fvcore": None}


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
        batches = spread_images(data, limit or IMAGES)
        return sampled_costs(measure(model, batches))
    except ZooError as error:
        print(f"warning: the cost is the schedule's upper limit: {error}", file=sys.stderr)
        return {}


def has_weights(cfg: DictConfig) -> bool:
    """Whether anything but random numbers is evaluated."""
    return cfg.weights is not None or bool(cfg.backbone and cfg.backbone.pretrained)


def _as_published(model: ReducedViT) -> dict[str, Any] | None:
    """The cost as the method's paper counts it; None where it counts as we do."""
    from zoo import flops

    convention = "zoo" if model.reducer is None else model.reducer.convention
    if convention == "zoo":
        return None
    found = flops.profile(model, convention=convention)
    return {"convention": convention, "total": found.gmacs, "dense": found.dense}


def _fvcore(model: ReducedViT) -> float | None:
    """fvcore's count, or None: it traces through a private interface of torch, and is a check."""
    from zoo.flops import fvcore_gmacs
    from zoo.run.evaluate import input_size

    try:
        return fvcore_gmacs(model, torch.zeros(1, *input_size(model)))
    except Exception as error:
        print(f"warning: fvcore could not count this model: {error}", file=sys.stderr)
        return None
