"""How close a model's answers stay to those of the dense model: the task `fidelity`.

Accuracy on few images tells two good reducers apart only by chance. Every image, labelled or not,
tells how far the answers have moved.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import reduce
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zoo.adapters.standalone import as_standalone
from zoo.errors import ZooError
from zoo.measure.describe import dense_of
from zoo.measure.fidelity import Closeness, closeness
from zoo.measure.processes import ALONE, Processes
from zoo.measure.progress import bar, batches_of
from zoo.published import config_folder
from zoo.run.shares import Share, measured

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from zoo.data.module import ImageData
    from zoo.model.reduced import ReducedViT


def measure_fidelity(
    cfg: DictConfig,
    model: ReducedViT,
    data: ImageData,
    device: torch.device,
    dtype: torch.dtype,
    limit: int | None = None,
    processes: Processes = ALONE,
) -> dict[str, Any]:
    """Returns the field `fidelity` of a row: against the same weights with nothing reduced.

    The dense model runs with the run-time options of the reduced one. A dense model at another
    input size is compared with itself at its own size. There is no answer for the dense model
    itself, which is what others are compared with, nor for an architecture that reduces tokens by
    itself, which has no dense form.

    Args:
        cfg: configs/eval.yaml, composed.
        model: The model.
        data: Its data, after `setup("test")`. Labels are not looked at.
        device: Where to run.
        dtype: Precision of autocast.
        limit: Stop after so many images.
        processes: Among which the images are shared out.

    Raises:
        NotFinite: One of the two answers an image with NaN or infinity.
        ZooError: There are no images.
    """
    if as_standalone(model.backbone) is not None:
        return {"fidelity": None}
    dense: Any = dense_of(model)
    other = data
    if model.reducer is None and not len(model.plugins):
        full = full_size_config(cfg)
        if full is None:
            return {"fidelity": None}
        from zoo.data import build_data
        from zoo.run.build import build_model

        dense = build_model(full).eval()
        other = build_data(full)
        other.attach(dense, check=False)
        other.setup("test")

    def compare(share: Share) -> Closeness:
        batches = _pairs(share, data, other)
        return closeness(model, dense, batches, device, dtype, share.limit, share.name)

    parts = measured(processes, data, limit, compare, lambda part: part.images)
    if not parts:
        raise ZooError("fidelity needs at least one image, got none")
    return {"fidelity": reduce(Closeness.plus, parts).means()}


def _pairs(share: Share, data: ImageData, other: ImageData) -> Iterator[Sequence[Tensor]]:
    """The same images for two models, and their places where they are a part of all."""
    loader = share.batches(data)
    batches = bar(loader, "fidelity", batches_of(loader, share.limit))
    if other is data:
        yield from ((x, x, *places) for x, _, *places in batches)
        return
    for (x, _, *places), (y, *_) in zip(batches, share.batches(other), strict=True):
        yield x, y, *places


def full_size_config(cfg: DictConfig) -> DictConfig | None:
    """The same configuration at the model's own input size; None where no other was asked for.

    The own size is that of the backbone option of this name, or else of the weights.
    """
    from omegaconf import OmegaConf

    asked, own = OmegaConf.select(cfg, "backbone.args.img_size"), _own_size(cfg)
    if asked is None or asked == own:
        return None
    # Weights that do not exist have no own size.
    if cfg.weights is None and not OmegaConf.select(cfg, "backbone.pretrained"):
        return None
    full = cfg.copy()
    OmegaConf.set_struct(full, False)
    if own is None:
        del full.backbone.args["img_size"]
    else:
        full.backbone.args["img_size"] = own
    if OmegaConf.select(full, "data.img_size") is not None:
        full.data.img_size = None
    return full


def _own_size(cfg: DictConfig) -> Any:
    """The input size that the backbone option of this name has, None where it has none.

    DINOv2 runs at 224 px here, and at 518 px where nobody asks.
    """
    from omegaconf import OmegaConf

    name = OmegaConf.select(cfg, "backbone.name", default=None)
    if name is None:
        return None
    for path in sorted((config_folder() / "backbone").glob("*.yaml")):
        option = OmegaConf.load(path)
        if OmegaConf.select(option, "name") == name:
            return OmegaConf.select(option, "args.img_size")
    return None
