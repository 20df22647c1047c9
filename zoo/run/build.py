"""From a configuration to a model: what training and evaluation share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from zoo.errors import BadCheckpoint, ZooError

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from zoo.model.reduced import ReducedViT

_ABSENT: Any = object()


def build_model(cfg: DictConfig, **backbone_args: Any) -> ReducedViT:
    """Builds the model that `backbone`, `reducer`, `schedule`, `plugin` and `weights` describe.

    With `weights` and no `backbone` the model is what was saved, and only what the command line
    chose replaces the saved reducer, schedule and plugins; `+backbone.args` without a name replaces
    arguments of the saved backbone. With a `backbone` the weights are loaded into that one.

    Args:
        cfg: A composed configuration; keys that are absent count as null.
        **backbone_args: Arguments for timm that win over those of the configuration, e.g.
            `num_classes`.

    Raises:
        ZooError: Something in the configuration cannot be built; the message says what to type.
    """
    weights, backbone = cfg.get("weights"), cfg.get("backbone")
    parts = {
        name: part
        for name, part in (
            ("reducer", _part(cfg, "reducer")),
            ("schedule", _schedule(cfg)),
            ("plugins", _part(cfg, "plugin")),
        )
        if part is not _ABSENT
    }
    args = {**(_plain((backbone or {}).get("args")) or {}), **backbone_args}
    if backbone is None or "name" not in backbone.keys():  # `in` is false for a missing value
        if weights is None:
            raise ZooError(
                "no model: type weights=vit_digits (or a model folder, a checkpoint, "
                "hf-hub:ORG/NAME) or backbone=NAME, e.g. backbone=deit_small"
            )
        return _set_runtime(cfg, _checked(_load(str(weights), parts, args)))
    from zoo.build import create_model

    parts["plugins"] = parts.get("plugins") or ()
    pretrained = bool(backbone.get("pretrained")) and weights is None
    model = create_model(str(backbone.name), pretrained=pretrained, **parts, **args)
    if weights is not None:
        from zoo.checkpoint import find, load_weights

        load_weights(model, find(str(weights)))
    return _set_runtime(cfg, _checked(model))


def instantiate(node: Any) -> Any:
    """Calls a node's `_target_`; a mistake in it comes out as one line.

    Raises:
        ZooError: The constructor refused its arguments, or there is nothing at that import path.
    """
    import hydra.utils
    from hydra.errors import InstantiationException

    from zoo.run.messages import explain

    try:
        return hydra.utils.instantiate(node)
    except InstantiationException as error:
        message = explain(error)
        if message is None:
            raise error.__cause__ or error from None
        raise ZooError(message) from error


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
    embed: Any = model.backbone.patch_embed
    size, patch = embed.img_size, model.tower.patch_size(model.backbone)
    published = tuple((model.pretrained_cfg.get("input_size") or ())[1:])
    if size and size != published and any(s % p for s, p in zip(size, patch, strict=True)):
        fits = max(patch[0], round(size[0] / patch[0]) * patch[0])
        raise ZooError(
            f"image size {size[0]}x{size[1]} is not a multiple of the patch size "
            f"{patch[0]}x{patch[1]}; expected for example +backbone.args.img_size={fits}"
        )
    return model


def _part(cfg: DictConfig, name: str) -> Any:
    """What a group describes: an instance, None for its option `none`, absent for null."""
    node = cfg.get(name)
    return _ABSENT if node is None else instantiate(node)


def _schedule(cfg: DictConfig) -> Any:
    # The default option without an r leaves the choice to the weights or the method.
    schedule = _part(cfg, "schedule")
    return _ABSENT if schedule is None else schedule


def _plain(node: Any) -> Any:
    from omegaconf import OmegaConf

    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
