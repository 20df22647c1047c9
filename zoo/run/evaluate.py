"""Measures a model: `evaluate(cfg)` builds it, runs the tasks, and returns the row.

Where a throughput is measured in several engines, `evaluate_each(cfg)` returns a row of each.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import OmegaConf

from reduction.functional import kernels
from zoo.errors import ZooError
from zoo.measure.costs import count_costs
from zoo.measure.describe import describe, method_name
from zoo.measure.device import pick_device, pick_dtype
from zoo.measure.processes import ALONE, Processes
from zoo.model.answers import NotFinite
from zoo.model.runtime import Runtime
from zoo.results.rows import new_row
from zoo.run.accuracy import image_limit, measure_accuracy
from zoo.run.build import build_model
from zoo.run.costs import sample_costs
from zoo.run.features import FEATURE_TASKS, measure_features
from zoo.run.machines import by_processes
from zoo.run.outcome import started
from zoo.run.throughput import engines_of, measure_throughput

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from zoo.model.reduced import ReducedViT

TASKS = (
    "accuracy",
    "flops",
    "throughput",
    "fidelity",
    *FEATURE_TASKS,
    "export",
    "select",
    "visualize",
)
# What several processes share out; the rest is about one.
_SHARED = ("accuracy", "flops", "fidelity", *FEATURE_TASKS)


def evaluate(cfg: DictConfig) -> dict[str, Any]:
    """Builds the model that a configuration describes and runs its tasks.

    Args:
        cfg: configs/eval.yaml, composed.

    Returns:
        The row of `zoo.results.rows`, everything that was not measured being None. A model that
        answers an image with NaN or infinity makes a row with status "failed".

    Raises:
        ZooError: An option has a value that cannot be; the message says what to type.
    """
    # Before processes are started.
    _check_early(cfg)
    return by_processes(cfg, _evaluate)


def evaluate_each(cfg: DictConfig) -> list[dict[str, Any]]:
    """As `evaluate`; of further engines a row with the throughput follows the first.

    Args:
        cfg: configs/eval.yaml, composed.

    Raises:
        ZooError: See `evaluate`.
    """
    engines = (cfg.get("throughput") or {}).get("engine")
    if not OmegaConf.is_list(engines) or cfg.get("trainer") is not None or started() > 1:
        return [evaluate(cfg)]
    _check_early(cfg)
    return _rows_of(cfg, ALONE, pick_device(str(cfg.device)))


def _check_early(cfg: DictConfig) -> None:
    """Refuses what can be seen before anything is built."""
    tasks, dtype = check_tasks(cfg.task), pick_dtype(str(cfg.dtype))
    if "throughput" in tasks:
        engines_of(cfg, pick_device(str(cfg.device)), dtype)


def _evaluate(cfg: DictConfig, processes: Processes, device: torch.device) -> dict[str, Any]:
    """Does it in one process, or in one of several."""
    return _rows_of(cfg, processes, device)[0]


def _rows_of(cfg: DictConfig, processes: Processes, device: torch.device) -> list[dict[str, Any]]:
    tasks, dtype = check_tasks(cfg.task), pick_dtype(str(cfg.dtype))
    others: list[dict[str, Any]] = []
    if processes.size > 1:
        _check_shared(cfg, tasks, processes.size)
    repeatable = bool(cfg.get("deterministic"))
    seed = int(cfg.seed)
    with kernels_chosen(repeatable, cfg.get("schedule")):
        torch.manual_seed(seed)
        model = build_model(cfg).eval()
        _check_same(model, processes)
        row = describe(model)
        row.update(task=tasks, seed=seed, weights=_text(cfg.weights), **_provenance(cfg, model))
        options = model.runtime._asdict()
        changed = {k: v for k, v in options.items() if v != Runtime._field_defaults[k]}
        row.update(runtime=changed or None, deterministic=repeatable)
        if set(tasks) - {"flops"}:
            name = _device_name(device, processes.size)
            row.update(device=name, dtype=str(cfg.dtype), compile=bool(cfg.compile))
            row.update(weights_dtype=_text(cfg.get("weights_dtype")))
        notes = [row.get("notes")]
        plain = dict(row)
        try:
            for found in _measured(cfg, model, tasks, device, dtype, processes):
                notes.append(found.pop("notes", None))
                if noted := found.pop("answers", None):
                    row["answers"] = {**(row.get("answers") or {}), **noted}
                others += found.pop("others", [])
                row.update(found)
        except NotFinite as error:
            row.update(status="failed", error=str(error))
        chosen = kernels.chosen_kernels() or None
        row.setdefault("kernels", chosen)
        if others:
            plain.update(count_costs(model, trace=False), kernels=chosen, task=["throughput"])
    own = row | {"notes": "; ".join(note for note in notes if note) or None}
    return [new_row(**own), *(new_row(**plain | one) for one in others)]


def _measured(
    cfg: DictConfig,
    model: ReducedViT,
    tasks: list[str],
    device: torch.device,
    dtype: torch.dtype,
    processes: Processes,
) -> Iterator[dict[str, Any]]:
    """Fields of the row, task by task.

    Raises:
        NotFinite: The model answers an image with NaN or infinity.
    """
    # Costs first: they are exact and take no time, and the rest may be interrupted.
    yield processes.first(lambda: count_costs(model, trace="flops" in tasks))
    limit = image_limit(cfg.limit)
    if "flops" in tasks and "accuracy" not in tasks:
        yield processes.first(lambda: sample_costs(cfg, model, limit))
    data: Any = None
    if set(tasks) & {"accuracy", "fidelity", *FEATURE_TASKS, "export", "select"}:
        from zoo.data import build_data

        # Outputs have classes for accuracy only; the others take images of any.
        data = build_data(cfg)
        data.attach(model, check="accuracy" in tasks)
        yield {"dataset": data.label, "split": data.splits["test"]}
        data.setup("test")
    if "accuracy" in tasks:
        yield measure_accuracy(cfg, model, data, device, dtype, processes)
    if "throughput" in tasks:
        first, *others = measure_throughput(cfg, model, device, dtype)
        yield {**first, "others": others}
    if "fidelity" in tasks:
        from zoo.run.fidelity import measure_fidelity

        yield measure_fidelity(cfg, model, data, device, dtype, limit, processes)
    if set(tasks) & set(FEATURE_TASKS):
        yield measure_features(cfg, model, data, tasks, device, dtype, limit, processes)
    if "export" in tasks:
        from zoo.run.export import measure_export

        yield measure_export(cfg, model, data)
    if "select" in tasks:
        from zoo.run.select import measure_selection

        yield measure_selection(cfg, model, data, device, dtype, limit)
    if "visualize" in tasks:
        from zoo.run.visualize import make_pictures

        yield make_pictures(cfg, model, device)
    if data is not None and data.damaged:
        yield {"notes": str(data.damaged)}


def in_time(schedule: Any) -> bool:
    """Whether a schedule of a configuration is a budget in time, which asks a clock."""
    return str((schedule or {}).get("_target_")).startswith("zoo.budget.time.")


@contextlib.contextmanager
def kernels_chosen(repeatable: bool, schedule: Any = None) -> Iterator[None]:
    """Within, a new list of chosen kernels begins; on wish they are chosen without a clock.

    Args:
        repeatable: The same command shall give the same bytes on the same machine.
        schedule: Of the configuration; a budget in time asks a clock.

    Raises:
        ZooError: Both are asked for.
    """
    if repeatable and in_time(schedule):
        raise ZooError(
            "deterministic=true goes without a clock, and a budget in time is measured with one; "
            "type schedule=target_gmacs, or deterministic=false"
        )
    kernels.forget_used()
    if not repeatable:
        yield
        return
    was = torch.are_deterministic_algorithms_enabled()
    warned = torch.is_deterministic_algorithms_warn_only_enabled()
    # cuBLAS reads it when it starts; without it matrix products may differ from run to run.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    kernels.set_deterministic(True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        kernels.set_deterministic(False)
        torch.use_deterministic_algorithms(was, warn_only=warned)


def check_tasks(task: Any) -> list[str]:
    """Returns the tasks as a list without repetitions.

    Raises:
        ZooError: A name is none of `TASKS`, or there is none.
    """
    from zoo.run.messages import nearest

    names = [task] if isinstance(task, str) else list(task or [])
    if not names:
        raise ZooError(f"task is empty; type task=[{','.join(TASKS)}] or one of them")
    for name in names:
        if name not in TASKS:
            hint = nearest(str(name), TASKS) or f"the tasks are {', '.join(TASKS)}"
            raise ZooError(f"task={name}: no such task; {hint}")
    return list(dict.fromkeys(names))


def _check_shared(cfg: DictConfig, tasks: Sequence[str], count: int) -> None:
    """Refuses what several processes cannot do together.

    Raises:
        ZooError: With what to do instead.
    """
    if alone := [task for task in tasks if task not in _SHARED]:
        raise ZooError(
            f"task={alone[0]} is done by one process, and these are {count}; run it by itself, "
            f"without trainer and torchrun (together: {', '.join(_SHARED)})"
        )
    if cfg.get("answers"):
        raise ZooError(
            f"answers=true keeps the images in their order, and {count} processes share them out; "
            "run it by itself, without trainer and torchrun"
        )
    if in_time(cfg.get("schedule")):
        raise ZooError(
            f"a budget in time is measured by one process, and these are {count}; type "
            "schedule=target_gmacs, or the schedule that one process finds"
        )


def _check_same(model: ReducedViT, processes: Processes) -> None:
    """Refuses to count answers of different models as those of one.

    Raises:
        ZooError: What was chosen by a clock differs from process to process.
    """
    recipes = processes.collect(lambda: json.dumps(model.recipe, sort_keys=True, default=str))
    if len(set(recipes)) > 1:
        raise ZooError(
            "the processes have built different models, because something of them is chosen by a "
            "clock; type deterministic=true"
        )


def _provenance(cfg: DictConfig, model: ReducedViT) -> dict[str, Any]:
    """Which file the weights came from, and whether and how they were trained with this reducer."""
    if cfg.weights is None:
        return {"weights_sha": None, "trained": False}
    from zoo.checkpoint import find, weights_sha256

    weights, method = str(cfg.weights), method_name(model)
    source = find(weights)
    # A training checkpoint; a model folder says it in its own rows.
    trained, training = source.suffix == ".ckpt" and _trained_method(source) == method, None
    metrics = source / "metrics.json"
    if metrics.is_file():
        try:
            rows = _listed(json.loads(metrics.read_text(encoding="utf-8")))
        except ValueError:
            rows = []
        made = [row for row in rows if row.get("trained")]
        own = [row for row in made if row.get("method") == method]
        trained = bool(own)
        if own:
            training = own[-1].get("training")
        elif made:  # with another method, or to be run dense: these are not weights as given
            training = made[-1].get("training") or {"method": made[-1].get("method")}
    return {"weights_sha": weights_sha256(weights), "trained": trained, "training": training}


def _trained_method(checkpoint: Path) -> str | None:
    """The method that a training checkpoint was trained with."""
    from zoo.checkpoint.files import read_any

    stored = read_any(checkpoint)
    known = stored.get("hyper_parameters") if isinstance(stored, Mapping) else None
    recipe = known.get("recipe") if isinstance(known, Mapping) else None
    if not isinstance(recipe, Mapping):
        return None
    reducer = recipe.get("reducer")
    return str(reducer.get("name")) if isinstance(reducer, Mapping) else "none"


def _listed(value: Any) -> list[dict[str, Any]]:
    return [row for row in value if isinstance(row, dict)] if isinstance(value, list) else []


def _device_name(device: torch.device, count: int = 1) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return name if count == 1 else f"{count}x {name}"


def _text(value: Any) -> str | None:
    return None if value is None else str(value)
