"""The task `throughput`: in which engines, what is timed beside the model, the fields of rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from omegaconf import OmegaConf
from torch import nn

from zoo.adapters.standalone import as_standalone
from zoo.errors import ZooError
from zoo.measure.describe import dense_of
from zoo.measure.engines import EXPORTED, Engine, Graphs
from zoo.measure.machine import machine
from zoo.measure.throughput import measure_each

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from zoo.model.reduced import ReducedViT

_BY_BATCH = (
    *("batch", "imgs_per_s", "imgs_per_s_dense", "imgs_per_s_timm", "ms", "cpu_ms"),
    *("peak_mem_mb", "peak_mem_mb_dense"),
)


def engines_of(cfg: DictConfig, device: torch.device, dtype: torch.dtype) -> list[Engine]:
    """The engines that a throughput is measured in; what cannot be is refused.

    Raises:
        ZooError: One is unknown, not installed, or cannot do what is asked.
    """
    given = cfg.throughput.get("engine")
    names = list(given) if OmegaConf.is_list(given) else [given] if given is not None else []
    if not names and given is not None:
        raise ZooError("throughput.engine is empty; type throughput.engine=torch or leave it out")
    if names and cfg.compile:
        raise ZooError(
            "compile=true and throughput.engine are two ways to say what runs the model; leave out "
            "compile and add compile to throughput.engine"
        )
    names = names or ["compile" if cfg.compile else "torch"]
    threads, graphs = cfg.throughput.threads, Graphs()
    return [Engine(name, device, dtype, threads, graphs=graphs) for name in dict.fromkeys(names)]


def measure_throughput(
    cfg: DictConfig, model: ReducedViT, device: torch.device, dtype: torch.dtype
) -> list[dict[str, Any]]:
    """Returns images per second, of the model and of its dense counterpart in turns, per engine.

    The fields of a row are those of the first batch size; `by_batch` holds all where there are
    several.
    """
    options = cfg.throughput
    sizes = list(options.batch) if OmegaConf.is_list(options.batch) else [options.batch]
    if not sizes:
        raise ZooError("throughput.batch is empty; type throughput.batch=32 or [1,16]")
    engines = engines_of(cfg, device, dtype)
    candidates = {e: _candidates(e, model.to(device), options.get("engine")) for e in engines}
    found = [
        measure_each(
            candidates,
            input_size=model.tower.input_size(model.backbone),
            batch=size,
            rounds=options.rounds,
            min_time=options.min_time,
            threads=options.threads,
            device=device,
        )
        for size in sizes
    ]
    rows = []
    for engine in engines:
        own = [one[engine] for one in found]
        spread = max(one.spread for one in own)
        by_batch = [{name: getattr(one, name) for name in _BY_BATCH} for one in own]
        row = {
            **by_batch[0],
            "by_batch": by_batch if len(own) > 1 else None,
            "threads": own[0].threads,
            "engine": engine.name,
            "machine": machine(),
            "notes": f"spread of the throughput rounds {100 * spread:.0f} %"
            if spread > 0.1
            else None,
        }
        if engine.version is not None:
            row["kernels"] = {engine.name: engine.version}
        rows.append(row)
    return rows


def _candidates(engine: Engine, model: ReducedViT, asked: Any) -> list[nn.Module]:
    """The model, its dense form, and that as its library has it, as far as they are to be timed."""
    if as_standalone(model.backbone) is not None:
        return [model]  # its own reduction: there is no dense model to take turns with
    timm = model.unwrap().eval() if model.tower.tensors else None
    # Whoever names engines asks how they compare. An exported graph has no kernels of ours.
    exported = engine.name in EXPORTED
    dense = dense_of(model, same_kernels=asked is not None and not exported).eval()
    if timm is None or (asked is None and dense is not timm):
        return [model, dense]
    return [model, dense, timm]
