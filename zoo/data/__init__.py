"""Images: any data set that timm can read, and two that need no download."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from torch import nn

    from zoo.data.module import ImageData as ImageData

__all__ = ["ImageData", "build_data"]


def __getattr__(name: str) -> Any:
    # Lightning takes seconds to import; whoever only needs the digits does not wait for it.
    if name == "ImageData":
        from zoo.data.module import ImageData

        return ImageData
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def build_data(cfg: DictConfig, model: nn.Module | None = None) -> ImageData:
    """Build the data module that a configuration describes.

    Args:
        cfg: The whole configuration; `data`, `augment` (optional) and `seed` are read.
        model: When given, image size and normalisation follow it, and it is checked to fit.

    Returns:
        The data module; call `setup("test")` and `test_dataloader()`, or hand it to a Trainer.

    Raises:
        ZooError: the data cannot be found, or does not fit the model.
    """
    from omegaconf import OmegaConf

    from zoo.version import built

    augment = cfg.get("augment")
    data: ImageData = built(
        cfg.data,
        augment=None if augment is None else OmegaConf.to_container(augment, resolve=True),
        seed=int(cfg.get("seed") or 0),
    )
    if model is not None:
        data.attach(model)
    return data
