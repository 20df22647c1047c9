"""The public functions, re-exported by `import zoo`."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import timm
from torch import nn

import reduction
from reduction.base import Reducer
from reduction.registry import create_reducer
from reduction.schedule import Schedule, create_schedule
from zoo.errors import UnknownName, ZooError
from zoo.plugins.base import Plugin, create_plugins
from zoo.reduced import ReducedViT
from zoo.runtime import Runtime

if TYPE_CHECKING:
    from zoo.flops import Profile

ReducerLike = str | Mapping[str, Any] | Reducer | None
ScheduleLike = Mapping[str, Any] | Schedule | None
PluginLike = str | Mapping[str, Any] | Plugin


def wrap(
    timm_model: nn.Module,
    reducer: ReducerLike,
    schedule: ScheduleLike = None,
    plugins: Sequence[PluginLike] = (),
    last_block: str = "full",
    fast_linear: str = "off",
) -> ReducedViT:
    """Attach a reducer to a timm model that you already have.

    Args:
        timm_model: A VisionTransformer or Eva of timm, with any weights. It is not copied.
        reducer: Registry name, mapping `{"name": ..., **args}`, instance, or None.
        schedule: Mapping such as `{"name": "constant_r", "r": 13}`, instance, or None for a keep
            rate of 0.7 at the quarter points of the depth.
        plugins: Names, mappings or instances.
        last_block: "class_token" computes in the last block only what a class-token head reads;
            exact. See `zoo.runtime.Runtime`; like all run-time options it is not saved.
        fast_linear: "auto" or "on": linear layers by a faster matrix product of this CPU; equal to
            rounding. See `zoo.runtime.Runtime`.

    Returns:
        The wrapped model.

    Raises:
        ZooError: If a name is unknown, an argument out of range, the model unsupported, or the
            budget out of reach.
    """
    if isinstance(timm_model, ReducedViT):
        raise ZooError("the model is wrapped already; pass model.unwrap() to wrap it again")
    built = create_reducer(reducer)
    sched = create_schedule(schedule)
    parts = create_plugins(plugins)
    return ReducedViT(timm_model, built, sched, parts, last_block, fast_linear)


def create_model(
    backbone: str,
    reducer: ReducerLike = None,
    schedule: ScheduleLike = None,
    plugins: Sequence[PluginLike] = (),
    pretrained: bool = False,
    last_block: str = "full",
    fast_linear: str = "off",
    **backbone_kwargs: Any,
) -> ReducedViT:
    """Build a timm backbone by name and attach a reducer.

    Args:
        backbone: timm name, with or without a weight tag (`deit_small_patch16_224.fb_in1k`).
        reducer: See `wrap`.
        schedule: See `wrap`.
        plugins: See `wrap`.
        pretrained: Load timm's weights from the hub.
        last_block: See `wrap`.
        fast_linear: See `wrap`.
        **backbone_kwargs: Arguments of `timm.create_model`, e.g. `num_classes`, `img_size`.

    Returns:
        The wrapped model, in training mode as timm's models are.

    Raises:
        UnknownName: If timm has no such model, with the nearest names.
        ZooError: As `wrap` does.
    """
    import zoo.models  # noqa: F401  (registers this package's own architectures with timm)

    # Cheap things first: a typo in a method should not wait for a large model.
    built = create_reducer(reducer)
    sched = create_schedule(schedule)
    parts = create_plugins(plugins)
    if not timm.is_model(backbone):
        raise UnknownName("backbone", backbone, timm.list_models())
    try:
        model = timm.create_model(backbone, pretrained=pretrained, **backbone_kwargs)
    except (TypeError, AssertionError, RuntimeError) as error:
        raise ZooError(f"timm cannot build {backbone!r} with {backbone_kwargs}: {error}") from error
    wrapped = ReducedViT(model, built, sched, parts, last_block, fast_linear)
    wrapped.backbone_args = {k: v for k, v in backbone_kwargs.items() if k != "num_classes"}
    return wrapped


def load(path_or_hub_name: str, **overrides: Any) -> ReducedViT:
    """Load a model with weights: a folder, a Lightning checkpoint, a shipped name, or the hub.

    Args:
        path_or_hub_name: Model folder, `.ckpt`, a shipped name such as "vit_digits", or
            `hf-hub:org/name`.
        **overrides: `reducer`, `schedule` or `plugins` to use instead of the saved ones; arguments
            of the backbone; `last_block` and `fast_linear`, which are never saved, see `wrap`.

    Raises:
        BadCheckpoint: If the file is missing, truncated, unsafe, or of another architecture.
    """
    from zoo.checkpoint import load as load_checkpoint

    runtime = {k: overrides.pop(k) for k in Runtime._fields if k in overrides}
    return load_checkpoint(path_or_hub_name, **overrides).set_runtime(**runtime)


def profile(model: nn.Module, **options: Any) -> Profile:
    """Count parameters, multiply-accumulates and tokens of a model, without running it.

    Args:
        model: A `ReducedViT` or a supported timm model.
        **options: See `zoo.flops.profile`.
    """
    from zoo.flops import profile as count

    return count(model, **options)


def list_models(pattern: str = "*") -> list[str]:
    """Names of the ViT-family backbones that timm and this package register.

    Args:
        pattern: Shell pattern such as `"deit*"`.
    """
    import zoo.models  # noqa: F401

    families = ("vision_transformer", "deit", "eva")
    names = {n for f in families for n in timm.list_models(module=f)}
    names |= {n for m in zoo.models.MODULES for n in timm.list_models(module=m)}
    return sorted(fnmatch.filter(names, pattern))


def list_methods() -> list[str]:
    """Registry names of all reducers."""
    return reduction.list_methods()
