"""The task `export`: a model as a folder for another runtime, compared on images of the data."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zoo.checkpoint import weights_sha256
from zoo.errors import ZooError
from zoo.measure.describe import method_name
from zoo.run.done import short

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from zoo.data.module import ImageData
    from zoo.model.reduced import ReducedViT


def measure_export(cfg: DictConfig, model: ReducedViT, data: ImageData) -> dict[str, Any]:
    """Writes the folder and returns the field `export` of a row.

    Args:
        cfg: configs/eval.yaml, composed.
        model: The model; its weights are float32.
        data: Its data, after `setup("test")`. Labels are not looked at.

    Raises:
        ZooError: The model cannot be exported, or does not answer as torch does.
    """
    from zoo.export import export_model

    options = cfg.export
    folder = options.folder or Path(cfg.paths.outputs) / "exported" / _name(cfg, model)
    images = _first(data.test_dataloader(), int(options.images))
    calibration: list[Tensor] = []
    if options.precision == "int8":
        data.setup("fit")
        calibration = _first(data.train_dataloader(), int(options.calibration))
    names = data.class_names
    known = names is not None and len(names) == model.num_classes
    found = export_model(
        model.cpu(),
        folder,
        format=str(options.format),
        precision=str(options.precision),
        preprocess=data.config,
        labels=names if known else None,
        images=images,
        calibration=calibration,
    )
    return {"export": found._asdict() | {"files": list(found.files)}}


def _first(batches: Any, count: int) -> list[Tensor]:
    """The first images of a loader, in its batches."""
    found: list[Tensor] = []
    left = count
    for images, _ in batches:
        if left <= 0:
            break
        found.append(torch.as_tensor(images)[:left])
        left -= len(found[-1])
    if count and not found:
        raise ZooError("export.images: the data have no images; type export.images=0")
    return found


def _name(cfg: DictConfig, model: ReducedViT) -> str:
    """Folder of a model that was given none: what it is, in words that every file system takes.

    Other weights under the same name and other budgets have folders of their own, or a row would
    lead to the graph of the run behind it.
    """
    recipe = model.recipe
    facts = {"recipe": recipe, "weights": weights_sha256(str(cfg.weights)) if cfg.weights else None}
    source = Path(str(cfg.weights)).name if cfg.get("weights") else recipe["backbone"]["name"]
    parts = [source, method_name(model), str(cfg.export.format), str(cfg.export.precision)]
    parts.append(short(facts))
    return re.sub(r"[^\w.-]+", "_", "-".join(parts))
