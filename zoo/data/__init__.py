"""Images: any data set that timm can read, and two that need no download."""

from __future__ import annotations

import warnings
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
    import hydra
    from omegaconf import OmegaConf

    augment = cfg.get("augment")
    with warnings.catch_warnings():  # which Hydra 1.4 gives authors of programs, on every call
        warnings.filterwarnings(
            "ignore", message=r"hydra\.utils\.instantiate\(\) resolved _target_"
        )
        data: ImageData = hydra.utils.instantiate(
            cfg.data,
            augment=None if augment is None else OmegaConf.to_container(augment, resolve=True),
            seed=int(cfg.get("seed") or 0),
        )
    if model is not None:
        data.attach(model)
    return data
