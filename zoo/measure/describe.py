"""What a row says of a model before anything is measured."""

from __future__ import annotations

from typing import Any

from torch import nn

from zoo.adapters.standalone import as_standalone
from zoo.model.reduced import ReducedViT
from zoo.model.runtime import Runtime


def describe(model: ReducedViT) -> dict[str, Any]:
    """Returns the fields of a row that say what a model is."""
    recipe = model.recipe
    size = model.tower.input_size(model.backbone)[1:]
    # The row names the budget that was asked for; the recipe holds the schedule solved from it.
    schedule = model.target.config() if model.target is not None else recipe["schedule"]
    alone = as_standalone(model.backbone)
    if alone is not None:
        schedule = alone.budget()
    return {
        "method": method_name(model),
        "reducer": recipe["reducer"],
        "backbone": recipe["backbone"]["name"],
        "tag": recipe["backbone"]["tag"],
        "schedule": schedule if method_name(model) != "none" else None,
        "img_size": size[0] if size[0] == size[1] else list(size),
        "recipe": recipe,
        # What a budget in time was solved with: the time itself holds on this machine only.
        "notes": str(measured) if (measured := getattr(model.target, "measured", None)) else None,
    }


def dense_of(model: ReducedViT, same_kernels: bool = False) -> nn.Module:
    """The same weights with nothing reduced, run with the run-time options of the model.

    Args:
        model: With any reducer.
        same_kernels: With the attention kernels, too, that the reduced blocks of the model get.
    """
    runtime = model.runtime._replace(own_kernels=True) if same_kernels else model.runtime
    if runtime == Runtime() and model.tower.tensors:
        return model.unwrap()
    kind = type(model) if model.tower.tensors else ReducedViT
    return kind(model.backbone).set_runtime(**runtime._asdict()).eval()


def method_name(model: ReducedViT) -> str:
    """Returns what reduces the tokens: the reducer, or the architecture itself, or "none"."""
    if model.reducer is not None:
        return str(model.recipe["reducer"]["name"])
    alone = as_standalone(model.backbone)
    return "none" if alone is None else alone.method
