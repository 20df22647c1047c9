"""Models from their parts: a backbone, a reducer, a schedule, plugins."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import timm
from torch import nn

from reduction.base import Reducer
from reduction.registry import create_reducer, create_schedule
from reduction.schedules.base import Schedule
from reduction.schedules.target import Target
from zoo.adapters.foreign import why_no_model, why_shell
from zoo.adapters.hollow import hollow
from zoo.adapters.tower import check_backbone, tower_of
from zoo.budget.align import resolved
from zoo.budget.solve import solve
from zoo.errors import UnknownName, UnsupportedModel, ZooError
from zoo.libraries.build import create
from zoo.libraries.names import split
from zoo.model.anatomy import Anatomy
from zoo.model.clip_tower import wrapper_of
from zoo.model.hf_model import as_called
from zoo.model.reduced import ReducedViT
from zoo.model.runtime import former
from zoo.plugins.base import Plugin, create_plugins
from zoo.published import published

#: Arguments of `timm.create_model` that say where weights are from or where the model is put, and
#: not what the model is. They are used up when it is built: no recipe holds them.
CONSUMED_ARGS = frozenset(
    {
        "pretrained",
        "pretrained_cfg",
        "pretrained_cfg_overlay",
        "pretrained_model_args",
        "pretrained_strict",
        "pretrained_filter_fn",
        "checkpoint_path",
        "cache_dir",
        "device",
        "dtype",
    }
)

#: Where a description of weights keeps the tag of those that a model from scratch could have had.
OFFERED = "offered_tag"
# Parts of a description that say where weights are from.
_SOURCES = frozenset({"url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source"})
# What timm takes from a description of weights, by the argument that says it too.
_DESCRIBED: dict[str, Callable[[Any], Any]] = {
    "img_size": lambda m: tower_of(m).input_size(m)[1:],
    "in_chans": lambda m: tower_of(m).input_size(m)[0],
    "global_pool": lambda m: m.global_pool,
}

ReducerLike = str | Mapping[str, Any] | Reducer | None
ScheduleLike = str | Mapping[str, Any] | Schedule | None
PluginLike = str | Mapping[str, Any] | Plugin


def wrap(
    timm_model: nn.Module,
    reducer: ReducerLike = None,
    schedule: ScheduleLike = None,
    plugins: Sequence[PluginLike] = (),
    last_block: str = "full",
    linear: str = "plain",
    fast_linear: str | bool | None = None,
    tensors: bool = False,
) -> ReducedViT:
    """Attach a reducer to a model that you already have.

    A model of Hugging Face is called as before, `pixel_values=` and all, and answers with its own
    output classes; see `zoo.model.hf_model.ReducedHfModel`.

    Args:
        timm_model: A supported model of timm, torchvision, open_clip or Hugging Face, with any
            weights. It is not copied.
        reducer: Registry name, mapping `{"name": ..., **args}`, instance, or None.
        schedule: Mapping such as `{"name": "constant_r", "r": 13}`, name of a published one such as
            "diffrate/deit_small_2.9", instance, or None for a keep rate of 0.7 at the quarter
            points of the depth.
        plugins: Names, mappings or instances.
        last_block: "class_token" computes in the last block only what a class-token head reads;
            exact. See `zoo.model.runtime.Runtime`; like all run-time options it is not saved.
        linear: "auto", "packed" or "onednn": linear layers by a faster matrix product of this CPU;
            equal to rounding. See `zoo.model.runtime.Runtime`.
        fast_linear: What `linear` was called: "off", "auto" or "on".
        tensors: Images in and logits out, as all others are called, for a model of Hugging Face
            too.

    Returns:
        The wrapped model, in training or evaluation mode as the model is.

    Raises:
        ZooError: If a name is unknown, an argument out of range, the model unsupported, or the
            budget out of reach.
    """
    if isinstance(timm_model, ReducedViT):
        raise ZooError("the model is wrapped already; pass model.unwrap() to wrap it again")
    if reason := why_no_model(timm_model) or why_shell(timm_model):
        raise UnsupportedModel(reason)
    check_backbone(timm_model)
    built = create_reducer(reducer)
    sched = create_schedule(published(schedule))
    parts = create_plugins(plugins)
    if _as_initialised(timm_model):
        set_tag(timm_model, None)
    linear = linear if fast_linear is None else former(fast_linear)
    made = assemble(timm_model, built, sched, parts, last_block, linear)
    return made if tensors or made.tower.tensors else as_called(made)


def create_model(
    backbone: str,
    reducer: ReducerLike = None,
    schedule: ScheduleLike = None,
    plugins: Sequence[PluginLike] = (),
    pretrained: bool = False,
    last_block: str = "full",
    linear: str = "plain",
    fast_linear: str | bool | None = None,
    **backbone_kwargs: Any,
) -> ReducedViT:
    """Build a backbone by name and attach a reducer.

    Args:
        backbone: timm name, with or without a weight tag (`deit_small_patch16_224.fb_in1k`); or a
            name of another library behind its prefix: `hf:facebook/dinov2-small`,
            `open_clip:ViT-B-32.openai`, `torchvision:vit_b_16`.
        reducer: See `wrap`.
        schedule: See `wrap`.
        plugins: See `wrap`.
        pretrained: Load the library's weights, from its cache or from the hub.
        last_block: See `wrap`.
        linear: See `wrap`.
        fast_linear: See `wrap`.
        **backbone_kwargs: Arguments of `timm.create_model`, e.g. `num_classes`, `img_size`, which
            the others know, too; else arguments by the library's own names.

    Returns:
        The wrapped model, in the mode in which its library makes it: timm's models are in
        training mode, pretrained ones of Hugging Face in evaluation mode.

    Raises:
        UnknownName: If the library has no such model, with the nearest names.
        ZooError: As `wrap` does.
    """
    import zoo.models  # noqa: F401  (registers this package's own architectures with timm)

    # Cheap things first: a typo in a method should not wait for a large model.
    built = create_reducer(reducer)
    sched = create_schedule(published(schedule))
    parts = create_plugins(plugins)
    linear = linear if fast_linear is None else former(fast_linear)
    library, own_name = split(backbone)
    if library is not None:
        model = create(library, own_name, pretrained, backbone_kwargs)
        return assemble(model, built, sched, parts, last_block, linear)
    backbone = own_name
    if not timm.is_model(backbone):
        raise UnknownName("backbone", backbone, timm.list_models())
    try:
        model = timm.create_model(backbone, pretrained=pretrained, **backbone_kwargs)
    except ZooError:
        raise
    except Exception as error:  # timm's models check little of what they are given
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        what = f"{backbone!r} with {backbone_kwargs}" if backbone_kwargs else repr(backbone)
        if pretrained and isinstance(error, OSError | RuntimeError):
            raise ZooError(f"timm cannot load the weights of {what}: {reason}") from error
        raise ZooError(f"timm cannot build {what}: {reason}") from error
    overlay = backbone_kwargs.get("pretrained_cfg_overlay") or {}
    # The tag belongs to timm's own weights, not to what another file holds. A model on the meta
    # device has none that it could be taken for.
    others = bool(_SOURCES & set(overlay) or backbone_kwargs.get("checkpoint_path"))
    if (others or not pretrained) and not next(model.parameters()).is_meta:
        set_tag(model, None)
    wrapped = assemble(model, built, sched, parts, last_block, linear)
    wrapped.backbone_args = _lasting(backbone, model, backbone_kwargs)
    return wrapped


def set_tag(backbone: Any, tag: str | None) -> None:
    """Say which of timm's pretrained weights a model started from; None for none of them.

    timm writes a tag into every model, also into those that never had the weights.
    """
    described = dict(getattr(backbone, "pretrained_cfg", None) or {})
    if (described.get("tag") or None) == tag:
        return
    described.setdefault(OFFERED, described.get("tag"))
    described["tag"] = tag
    backbone.pretrained_cfg = described
    backbone.default_cfg = described  # timm keeps both names for one dictionary


def _as_initialised(backbone: Any) -> bool:
    """Whether nobody has trained a model: its norms are still all ones and zeros."""
    for block in getattr(backbone, "blocks", ()):
        norm = getattr(block, "norm1", None)
        weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
        if weight is None or weight.is_meta or not bool((weight == 1).all()):
            return False
        if bias is not None and bool(bias.any()):
            return False
    return len(getattr(backbone, "blocks", ())) > 0


def _lasting(name: str, model: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments that build the same model again, without what was used up."""
    args = {k: v for k, v in given.items() if k not in CONSUMED_ARGS and k != "num_classes"}
    if not (given.get("pretrained_cfg") or given.get("pretrained_cfg_overlay")):
        return args
    # timm takes defaults from a description of weights; without it they have to be said.
    with hollow():
        plain = timm.create_model(name, num_classes=model.num_classes, **args)
    for key, read in _DESCRIBED.items():
        if key not in args and read(plain) != read(model):
            args[key] = read(model)
    return args


def assemble(
    backbone: nn.Module,
    reducer: Reducer | None = None,
    schedule: Schedule | None = None,
    plugins: Sequence[Plugin] = (),
    last_block: str = "full",
    linear: str = "plain",
) -> ReducedViT:
    """A model from parts that are built already, in the backbone's mode; a budget is solved first.

    Args:
        backbone: See `zoo.model.reduced.ReducedViT`, as for the others.
        reducer: The method, or None.
        schedule: A schedule, or a target.
        plugins: Parts that act around the blocks.
        last_block: See `zoo.model.runtime.Runtime`.
        linear: See `zoo.model.runtime.Runtime`.

    Raises:
        UnreachableBudget: If the target cannot be met.
        ZooError: If the parts cannot work together.
    """
    if schedule is not None and schedule.align == "auto":
        schedule = resolved(schedule, Anatomy(backbone, reducer, plugins))
    target = schedule if isinstance(schedule, Target) else None
    if target is not None and reducer is not None:
        schedule = solve(target, Anatomy(backbone, reducer, plugins), last_block)
    elif target is not None:
        schedule = None
    made = wrapper_of(backbone)(backbone, reducer, schedule, plugins, last_block, linear, target)
    # What is new follows the backbone, whose own parts may be in different modes.
    made.training = backbone.training
    for part in (made.reducer, made.plugins):
        if part is not None:
            part.train(backbone.training)
    return made
