"""The same configuration with something else about it: another image size, nothing reduced."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omegaconf import DictConfig

#: Options of a model in which nothing happens to the tokens.
NOTHING: dict[str, Any] = {
    "reducer": {"_target_": "reduction.registry.no_reducer"},
    "schedule": {"_target_": "reduction.registry.default_schedule", "r": None},
    "plugin": {"_target_": "zoo.plugins.no_plugins"},
}


def copied(cfg: DictConfig) -> DictConfig:
    """A copy that takes new keys."""
    from omegaconf import OmegaConf

    other = cfg.copy()
    OmegaConf.set_struct(other, False)
    return other


def nothing_reduced(cfg: DictConfig) -> DictConfig:
    """The same configuration with nothing reduced."""
    other = copied(cfg)
    other.update(NOTHING)
    return other


def at_size(cfg: DictConfig, pixels: int) -> DictConfig:
    """The same configuration with square images of another size.

    Args:
        cfg: configs/eval.yaml, composed.
        pixels: Side of the images.
    """
    from omegaconf import OmegaConf

    other = copied(cfg)
    OmegaConf.update(other, "backbone.args.img_size", pixels, force_add=True)
    if OmegaConf.select(other, "data.img_size") is not None:
        other.data.img_size = None
    return other
