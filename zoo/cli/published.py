"""Our exact GMACs of published settings: `python -m zoo.cli.docs --published` writes them.

Models are built on the meta device, so that the largest take no memory; nothing is run.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from timm.utils.model import reparameterize_model

import zoo
from zoo.cost.counters import torch_gmacs
from zoo.errors import ZooError
from zoo.published import config_folder
from zoo.report.published import COSTS, entries, key_of, runs_here


def write(results: Path) -> Path:
    """Compute what is not stored yet, forget what is not asked for any more.

    Args:
        results: Folder with `published.yaml`.

    Returns:
        The file.
    """
    path = results / COSTS
    stored = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    costs: dict[str, float | None] = {}
    for entry in entries(results):
        key = key_of(entry)
        if runs_here(entry) and key not in costs:
            costs[key] = stored[key] if key in stored else cost_of(entry)
    path.write_text(json.dumps(costs, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return path


def cost_of(entry: Mapping[str, Any]) -> float | None:
    """Exact GMACs of one published setting; None where they cannot be reached here.

    Args:
        entry: Of `results/published.yaml`, with a method that is here.
    """
    if "timm" in entry:
        return round(_other(entry), 6)
    reducer = entry.get("reducer")
    name, args = _backbone(entry["backbone"])
    try:
        with torch.device("meta"):
            schedule = None if reducer is None else _schedule(entry)
            model = zoo.create_model(name, reducer, schedule, **args)
    except ZooError as error:
        what = f"{entry['method']} on {entry['backbone']} at {entry.get('gmacs')}"
        print(f"no GMACs of {what}: {error}", file=sys.stderr)
        return None
    return round(zoo.profile(model).gmacs, 6)


def _backbone(option: str) -> tuple[str, dict[str, Any]]:
    """Name and arguments behind an option of `backbone=`; a classifier where weights bring none."""
    from omegaconf import OmegaConf

    known: Any = OmegaConf.to_container(
        OmegaConf.load(config_folder() / "backbone" / f"{option}.yaml")
    )
    args = dict(known.get("args") or {})
    if option.startswith("mae_"):
        args |= {"num_classes": 1000, "global_pool": "avg"}
    return str(known["name"]), args


def _schedule(entry: Mapping[str, Any]) -> Any:
    if "published" in entry:
        return entry["published"]
    schedule = entry.get("schedule")
    if schedule is None:
        return {"name": "target_gmacs", "gmacs": entry["gmacs"], "nearest": True}
    name = "constant_r" if "r" in schedule else "keep_rate"
    # As the authors' code: what a block cannot remove stays.
    return {"name": name, **schedule, **({"strict": False} if "r" in schedule else {})}


def _other(entry: Mapping[str, Any]) -> float:
    """Of a model that is none of ours: by torch's counter, as it is run."""
    model = timm.create_model(entry["timm"]).eval()
    published: Any = model.default_cfg
    channels, height, width = published["input_size"]
    side = entry.get("img_size")
    height, width = (height, width) if side is None else (side, side)
    return torch_gmacs(reparameterize_model(model), torch.empty(1, channels, height, width))
