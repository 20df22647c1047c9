"""Building a recipe's backbone without content: would it be the one that is saved or loaded?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from zoo.adapters.hollow import hollow
from zoo.checkpoint.positions import Grid, own_grid
from zoo.libraries.build import rebuild

# Switches of how to run, not of what is computed.
_RUNTIME = frozenset(
    {"training", "grad_checkpointing", "fused_attn", "inplace", "export", "name_or_path"}
)


def tuples(value: Any) -> Any:
    """JSON has no tuples, and timm tells (384, 384) from [384, 384] in places."""
    return tuple(tuples(v) for v in value) if isinstance(value, list) else value


def twin(recipe: Mapping[str, Any], **changes: Any) -> nn.Module:
    """Build the backbone of a recipe on the meta device: names and shapes, no memory.

    Args:
        recipe: ``config["backbone"]``.
        **changes: Arguments that differ from the recipe's.
    """
    import timm

    import zoo.models  # noqa: F401  (registers our own architectures with timm)

    if library := recipe.get("library"):
        given = {**recipe["args"], **changes}
        with hollow():
            return rebuild(library, recipe["name"], recipe["num_classes"], given)
    args = {k: tuples(v) for k, v in recipe["args"].items()}
    if recipe["num_classes"] is not None:
        args["num_classes"] = recipe["num_classes"]
    with hollow():
        return timm.create_model(recipe["name"], **{**args, **changes})


def grid_of_recipe(recipe: Mapping[str, Any]) -> Grid | None:
    """Grid of the position table of a recipe's backbone; None where it cannot be built."""
    try:
        return own_grid(twin(recipe))
    except Exception:  # only a hint: whoever needs the model says what is wrong with it
        return None


def cannot_rebuild(backbone: nn.Module, recipe: Mapping[str, Any]) -> str:
    """Say why a recipe's name and arguments do not build this backbone; empty if they do.

    A model wrapped by hand may have been built with arguments that nobody wrote down. Most show in
    the shapes of its weights; others, such as ``global_pool``, only in plain attributes.
    """
    import timm

    name, args = recipe["name"], {k: tuples(v) for k, v in recipe["args"].items()}
    if not recipe.get("library") and not timm.is_model(name):
        return f"{name} is no timm model name"
    try:
        other = twin(recipe)
    except Exception as error:
        who = recipe.get("library") or "timm"
        return f"{who} cannot build {name} with {args} ({error})"
    return _odd(backbone, other, f"{name} with {args}")


def _odd(backbone: nn.Module, twin: nn.Module, what: str) -> str:
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
    return f"{what} is another model ({'; '.join(odd[:2])}{more})"


def _flags(model: nn.Module) -> dict[str, Any]:
    return {
        f"{path}.{key}".lstrip("."): value
        for path, module in model.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, bool | int | str) and not key.startswith("_") and key not in _RUNTIME
    }
