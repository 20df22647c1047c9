"""Would the recipe build the backbone that is being saved?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

# Switches of how to run, not of what is computed.
_RUNTIME = frozenset({"training", "grad_checkpointing", "fused_attn", "inplace", "export"})


def cannot_rebuild(backbone: nn.Module, recipe: Mapping[str, Any]) -> str:
    """Say why a recipe's name and arguments do not build this backbone; empty if they do.

    A model wrapped by hand may have been built with arguments that nobody wrote down. Most show in
    the shapes of its weights; others, such as ``global_pool``, only in plain attributes.
    """
    import timm

    name = recipe["name"]
    args: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in recipe["args"].items()
    }
    if not timm.is_model(name):
        return f"{name} is no timm model name"
    try:
        with torch.device("meta"):
            twin = timm.create_model(name, num_classes=recipe["num_classes"], **args)
    except Exception as error:
        return f"timm cannot build {name} with {args} ({error})"
    mine, other = backbone.state_dict(), twin.state_dict()
    odd = [
        f"{k} is {tuple(mine[k].shape) if k in mine else 'absent'}, "
        f"would be {tuple(other[k].shape) if k in other else 'absent'}"
        for k in [*mine, *(k for k in other if k not in mine)]
        if k not in mine or k not in other or mine[k].shape != other[k].shape
    ]
    if not odd:
        mine_flags, other_flags = _flags(backbone), _flags(twin)
        odd = [
            f"{k} is {mine_flags.get(k)!r}, would be {other_flags.get(k)!r}"
            for k in sorted(mine_flags.keys() | other_flags.keys())
            if mine_flags.get(k) != other_flags.get(k)
        ]
    if not odd:
        return ""
    more = f" and {len(odd) - 2} more" if len(odd) > 2 else ""
    return f"{name} with {args} is another model ({'; '.join(odd[:2])}{more})"


def _flags(model: nn.Module) -> dict[str, Any]:
    return {
        f"{path}.{key}".lstrip("."): value
        for path, module in model.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, bool | int | str) and not key.startswith("_") and key not in _RUNTIME
    }
