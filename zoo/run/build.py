"""From a configuration to a model: what training and evaluation share."""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from reduction.arguments import check_arguments
from zoo.errors import BadCheckpoint, ZooError

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from zoo.model.reduced import ReducedViT

_ABSENT: Any = object()


def build_model(
    cfg: DictConfig, *, new_head: bool | Literal["auto"] = False, **backbone_args: Any
) -> ReducedViT:
    """Builds the model that `backbone`, `reducer`, `schedule`, `plugin` and `weights` describe.

    With `weights` and no `backbone` the model is what was saved, and only what the command line
    chose replaces the saved reducer, schedule and plugins; `+backbone.args` without a name replaces
    arguments of the saved backbone. With a `backbone` the weights are loaded into that one.

    Args:
        cfg: A composed configuration; keys that are absent count as null.
        new_head: For weights that go into a `backbone`; see `zoo.checkpoint.load_weights`. Training
            takes "auto".
        **backbone_args: Arguments for timm that win over those of the configuration, e.g.
            `num_classes`.

    Raises:
        ZooError: Something in the configuration cannot be built; the message says what to type.
    """
    weights, backbone = cfg.get("weights"), cfg.get("backbone")
    cast = _cast(cfg)
    parts = {
        name: part
        for name, part in (
            ("reducer", _part(cfg, "reducer")),
            ("schedule", _schedule(cfg, cast)),
            ("plugins", _part(cfg, "plugin")),
        )
        if part is not _ABSENT
    }
    # In a sweep over reducers the dense model is among them, and has no use for their schedule.
    if parts.get("reducer", _ABSENT) is None and "schedule" in parts:
        parts["schedule"] = None
    args = {**_arguments(backbone), **backbone_args}
    if backbone is None or "name" not in backbone.keys():  # `in` is false for a missing value
        if weights is None:
            raise ZooError(
                "no model: type weights=vit_digits (or a model folder, a checkpoint, "
                "hf-hub:ORG/NAME) or backbone=NAME, e.g. backbone=deit_small"
            )
        return _set_runtime(cfg, _checked(_load(str(weights), parts, args)).to(cast))
    from zoo.build import create_model

    parts["plugins"] = parts.get("plugins") or ()
    pretrained = bool(backbone.get("pretrained")) and weights is None
    model = create_model(_name(backbone), pretrained=pretrained, **parts, **args)
    if weights is not None:
        _load_into(model, str(weights), new_head)
    return _set_runtime(cfg, _checked(model).to(cast))


def _name(backbone: Any) -> str:
    """The name that `zoo.create_model` takes."""
    library = backbone.get("library")
    return f"{library}:{backbone.name}" if library else str(backbone.name)


# What the options of a command line say already, by the arguments that would say it once more.
_TAKEN = {
    "backbone": "backbone.name=",
    "model_name": "backbone.name=",
    "pretrained": "backbone.pretrained=",
    "reducer": "reducer=",
    "schedule": "schedule=",
    "plugins": "plugin=",
    "last_block": "runtime.last_block=",
    "linear": "runtime.linear=",
    "fast_linear": "runtime.linear=",
    "buckets": "runtime.buckets=",
}


def _arguments(backbone: Any) -> dict[str, Any]:
    """Arguments for timm, or for the library that the backbone is from.

    Raises:
        ZooError: They are no mapping, or hold what another option says.
    """
    args = _plain((backbone or {}).get("args")) or {}
    if not isinstance(args, dict):
        raise ZooError(
            "backbone.args holds arguments for timm, e.g. +backbone.args.img_size=384; "
            f"got {args!r}"
        )
    if taken := next((key for key in args if key in _TAKEN), None):
        raise ZooError(f"backbone.args.{taken}: type {_TAKEN[taken]}{args[taken]} instead")
    return args


def _load_into(model: ReducedViT, weights: str, new_head: bool | Literal["auto"]) -> None:
    from zoo.checkpoint import find, load_weights
    from zoo.checkpoint.weights import OtherClassifier

    try:
        load_weights(model, find(weights), new_head=new_head)
    except OtherClassifier as error:
        if error.classes:
            advice = f"type +backbone.args.num_classes={error.classes}"
        else:
            advice = (
                "train one with train.py, or compare answers without labels: "
                "task=fidelity +backbone.args.num_classes=0"
            )
        has = f"{error.classes} classes" if error.classes else "no classifier"
        raise BadCheckpoint(
            f"weights={weights}: the file has {has}, the model {model.num_classes} classes; "
            f"{advice}"
        ) from error


def instantiate(node: Any, name: str = "") -> Any:
    """Calls a node's `_target_`; a mistake in it comes out as one line.

    Args:
        node: A mapping with a `_target_`, or None.
        name: Of the option that it is the value of, for messages.

    Raises:
        ZooError: The constructor refused its arguments, or there is nothing at that import path.
    """
    from hydra.errors import InstantiationException

    from zoo.run.messages import explain
    from zoo.version import built as call

    try:
        built = call(node)
    except InstantiationException as error:
        cause = error.__cause__
        if not isinstance(cause, ZooError):  # which would know better
            _check_types(node, name)
        message = explain(error)
        if message is None:
            raise cause or error from None
        raise ZooError(message) from error
    _check_types(node, name)
    return built


def _check_types(node: Any, name: str) -> None:
    """Refuses arguments of other types than a constructor of ours says that it takes."""
    plain = _plain(node)
    target = plain.get("_target_") if isinstance(plain, Mapping) else None
    if not isinstance(target, str) or not target.startswith(("reduction.", "zoo.")):
        return
    try:
        build = pkgutil.resolve_name(target)
    except (ImportError, AttributeError, ValueError):
        return  # the builder says that there is nothing of that name
    given = {key: value for key, value in plain.items() if not key.startswith("_")}
    check_arguments(build, given, f"{name}." if name else "")


def _load(weights: str, parts: dict[str, Any], backbone_args: Mapping[str, Any]) -> ReducedViT:
    from zoo.checkpoint import load

    try:
        return load(weights, **parts, **backbone_args)
    except BadCheckpoint as error:
        if "without a recipe" not in str(error):
            raise
        raise BadCheckpoint(
            f"{weights}: weights alone, without a recipe; add the architecture: backbone=NAME"
        ) from error


def _set_runtime(cfg: DictConfig, model: ReducedViT) -> ReducedViT:
    return model.set_runtime(**(_plain(cfg.get("runtime")) or {}))


def _checked(model: ReducedViT) -> ReducedViT:
    # timm builds such a model and fails at the first image.
    if model.tower.library != "timm":
        return model
    size, patch = model.tower.input_size(model.backbone)[1:], model.tower.patch_size(model.backbone)
    published = tuple((model.pretrained_cfg.get("input_size") or ())[1:])
    # A published size may leave a rim that the patches do not reach, where timm says so.
    embed = getattr(model.backbone, "patch_embed", None)
    strict = getattr(embed, "strict_img_size", True) or getattr(embed, "dynamic_img_pad", False)
    rim = size == published and strict
    whole = not size or all(s % p == 0 for s, p in zip(size, patch, strict=True))
    if not whole and not (rim and all(s > p for s, p in zip(size, patch, strict=True))):
        fits = max(patch[0], round(size[0] / patch[0]) * patch[0])
        raise ZooError(
            f"image size {size[0]}x{size[1]} is not a multiple of the patch size "
            f"{patch[0]}x{patch[1]}; expected for example +backbone.args.img_size={fits}"
        )
    return model


def _part(cfg: DictConfig, name: str) -> Any:
    """What a group describes: an instance, None for its option `none`, absent for null."""
    node = cfg.get(name)
    return _ABSENT if node is None else instantiate(node, name)


def _cast(cfg: DictConfig) -> Any:
    """The type that weights are cast to; None leaves them as they are."""
    from zoo.measure.device import pick_dtype

    name = cfg.get("weights_dtype")
    return None if name is None else pick_dtype(str(name), "weights_dtype")


def _schedule(cfg: DictConfig, dtype: Any) -> Any:
    # The default option without an r leaves the choice to the weights or the method.
    schedule = _part(cfg, "schedule")
    if schedule is not _ABSENT and schedule is not None and dtype is not None:
        schedule.dtype = dtype  # of what is timed before the weights are cast
    return _ABSENT if schedule is None else schedule


def _plain(node: Any) -> Any:
    from omegaconf import OmegaConf

    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
