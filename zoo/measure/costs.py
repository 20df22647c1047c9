"""The cost fields of a result row: counted from shapes, or measured on images."""

from __future__ import annotations

import sys
from typing import Any

import torch

from zoo.cost.counters import fvcore_gmacs
from zoo.cost.profile import profile
from zoo.cost.types import Profile
from zoo.measure.device import like_weights
from zoo.model.reduced import ReducedViT


def count_costs(model: ReducedViT, trace: bool = True) -> dict[str, Any]:
    """Returns tokens, parameters and GMACs, of the model and of its dense counterpart.

    Args:
        model: The model.
        trace: Let fvcore count too, which runs one image through the model.
    """
    found = profile(model)
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


def _as_published(model: ReducedViT) -> dict[str, Any] | None:
    """The cost as the method's paper counts it; None where it counts as we do."""
    convention = "zoo" if model.reducer is None else model.reducer.card.convention
    if convention == "zoo":
        return None
    found = profile(model, convention=convention)
    return {"convention": convention, "total": found.gmacs, "dense": found.dense}


def _fvcore(model: ReducedViT) -> float | None:
    """fvcore's count, or None: it traces through a private interface of torch, and is a check."""
    try:
        image = torch.zeros(1, *model.tower.input_size(model.backbone))
        return fvcore_gmacs(model, like_weights(image, model, image.device))
    except Exception as error:
        print(f"warning: fvcore could not count this model: {error}", file=sys.stderr)
        return None
