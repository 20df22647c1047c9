"""Models from their parts: a backbone, a reducer, a schedule, plugins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import timm
from torch import nn

from reduction.base import Reducer
from reduction.registry import create_reducer, create_schedule
from reduction.schedules.base import Schedule
from reduction.schedules.target import Target
from zoo.budget.solve import solve
from zoo.errors import UnknownName, ZooError
from zoo.model.anatomy import Anatomy
from zoo.model.reduced import ReducedViT
from zoo.plugins.base import Plugin, create_plugins
from zoo.published import published

ReducerLike = str | Mapping[str, Any] | Reducer | None
ScheduleLike = str | Mapping[str, Any] | Schedule | None
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
        schedule: Mapping such as `{"name": "constant_r", "r": 13}`, name of a published one such as
            "diffrate/deit_small_2.9", instance, or None for a keep rate of 0.7 at the quarter
            points of the depth.
        plugins: Names, mappings or instances.
        last_block: "class_token" computes in the last block only what a class-token head reads;
            exact. See `zoo.model.runtime.Runtime`; like all run-time options it is not saved.
        fast_linear: "auto" or "on": linear layers by a faster matrix product of this CPU; equal to
            rounding. See `zoo.model.runtime.Runtime`.

    Returns:
        The wrapped model.

    Raises:
        ZooError: If a name is unknown, an argument out of range, the model unsupported, or the
            budget out of reach.
    """
    if isinstance(timm_model, ReducedViT):
        raise ZooError("the model is wrapped already; pass model.unwrap() to wrap it again")
    built = create_reducer(reducer)
    sched = create_schedule(published(schedule))
    parts = create_plugins(plugins)
    return assemble(timm_model, built, sched, parts, last_block, fast_linear)


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
    sched = create_schedule(published(schedule))
    parts = create_plugins(plugins)
    if not timm.is_model(backbone):
        raise UnknownName("backbone", backbone, timm.list_models())
    try:
        model = timm.create_model(backbone, pretrained=pretrained, **backbone_kwargs)
    except (TypeError, AssertionError, RuntimeError) as error:
        raise ZooError(f"timm cannot build {backbone!r} with {backbone_kwargs}: {error}") from error
    wrapped = assemble(model, built, sched, parts, last_block, fast_linear)
    wrapped.backbone_args = {k: v for k, v in backbone_kwargs.items() if k != "num_classes"}
    return wrapped


def assemble(
    backbone: nn.Module,
    reducer: Reducer | None = None,
    schedule: Schedule | None = None,
    plugins: Sequence[Plugin] = (),
    last_block: str = "full",
    fast_linear: str = "off",
) -> ReducedViT:
    """A model from parts that are built already; a budget is solved first.

    Args:
        backbone: See `zoo.model.reduced.ReducedViT`, as for the others.
        reducer: The method, or None.
        schedule: A schedule, or a target.
        plugins: Parts that act around the blocks.
        last_block: See `zoo.model.runtime.Runtime`.
        fast_linear: See `zoo.model.runtime.Runtime`.

    Raises:
        UnreachableBudget: If the target cannot be met.
        ZooError: If the parts cannot work together.
    """
    target = schedule if isinstance(schedule, Target) else None
    if target is not None and reducer is not None:
        schedule = solve(target, Anatomy(backbone, reducer, plugins), last_block)
    elif target is not None:
        schedule = None
    return ReducedViT(backbone, reducer, schedule, plugins, last_block, fast_linear, target)
