"""How close a model's answers stay to those of the dense model: the task `fidelity`.

Accuracy on few images tells two good reducers apart only by chance. Every image, labelled or not,
tells how far the answers have moved.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zoo.adapters.standalone import as_standalone
from zoo.measure.fidelity import compare_answers

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from zoo.model.reduced import ReducedViT


def measure_fidelity(
    cfg: DictConfig,
    model: ReducedViT,
    device: torch.device,
    dtype: torch.dtype,
    limit: int | None = None,
) -> dict[str, Any]:
    """Returns the field `fidelity` of a row: against the same weights with nothing reduced.

    A dense model at another input size is compared with itself at its own size. There is no answer
    for the dense model itself, which is what others are compared with, nor for an architecture
    that reduces tokens by itself, which has no dense form.

    Raises:
        ZooError: The data does not fit the model, or there is none.
    """
    from zoo.data import build_data

    if as_standalone(model.backbone) is not None:
        return {"fidelity": None}
    data = build_data(cfg, model)
    data.setup("test")
    dense: Any = model.unwrap()
    batches: Iterable[tuple[Tensor, Tensor]] = ((x, x) for x, _ in data.test_dataloader())
    if model.reducer is None:
        full = full_size_config(cfg)
        if full is None:
            return {"fidelity": None}
        from zoo.run.build import build_model

        dense = build_model(full).eval()
        other = build_data(full, dense)
        other.setup("test")
        pairs = zip(data.test_dataloader(), other.test_dataloader(), strict=True)
        batches = ((x, y) for (x, _), (y, _) in pairs)
    return {"fidelity": compare_answers(model, dense, batches, device, dtype, limit=limit)}


def full_size_config(cfg: DictConfig) -> DictConfig | None:
    """The same configuration at the model's own input size; None where no other was asked for."""
    from omegaconf import OmegaConf

    if OmegaConf.select(cfg, "backbone.args.img_size") is None:
        return None
    # Weights that do not exist have no own size.
    if cfg.weights is None and not OmegaConf.select(cfg, "backbone.pretrained"):
        return None
    full = cfg.copy()
    OmegaConf.set_struct(full, False)
    del full.backbone.args["img_size"]
    if OmegaConf.select(full, "data.img_size") is not None:
        full.data.img_size = None
    return full
