"""The dense model that a loss compares with, by the name that a command gives."""

from __future__ import annotations

from typing import TYPE_CHECKING

from zoo.errors import ZooError

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from zoo.data.module import ImageData
    from zoo.model.reduced import ReducedViT


def teacher_of(cfg: DictConfig, name: str | None, data: ImageData) -> ReducedViT | None:
    """Builds it; None where the model teaches itself, as it was before.

    Args:
        cfg: configs/train.yaml, composed.
        name: `loss.teacher`.
        data: Attached to the student.

    Raises:
        ZooError: There is no such model, or it was made for other pixels than the student gets.
    """
    if name is None:
        backbone = cfg.get("backbone")
        if cfg.get("weights") is None and not (backbone or {}).get("pretrained"):
            raise ZooError(
                "loss=trg without loss.teacher: the model would learn from itself as it starts, "
                "and it starts from scratch; type loss.teacher=NAME, weights=NAME or "
                "backbone.pretrained=true"
            )
        return None
    from zoo.backbones import exists
    from zoo.build import create_model
    from zoo.checkpoint import list_assets, load

    if name not in list_assets() and exists(name):
        teacher = create_model(name, pretrained=True)
    else:
        teacher = load(name)
    made, given = teacher.pretrained_cfg, data.config or {}
    for key in ("mean", "std"):
        one, other = _channels(made.get(key)), _channels(given.get(key))
        if one and other and max(abs(a - b) for a, b in zip(one, other, strict=False)) > 1e-3:
            raise ZooError(
                f"loss.teacher={name} was made for pixels with {key}={list(one)}, and the student "
                f"gets data.{key}={list(other)}; type data.{key}={list(one)}"
            )
    return teacher.eval()


def _channels(value: object) -> tuple[float, ...]:
    return tuple(float(v) for v in value) if isinstance(value, list | tuple) else ()
