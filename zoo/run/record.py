"""The row of a run on its way to disk: where it goes, what repeats it, what it says of a failure.

Nothing here imports torch at module level, see `zoo.run.entry`.
"""

from __future__ import annotations

import os
import shlex
import tempfile
from typing import TYPE_CHECKING, Any

from zoo.run.outcome import State

if TYPE_CHECKING:
    from omegaconf import DictConfig

Row = dict[str, Any]


def command_line() -> str:
    """Returns the command that repeats this one run, also from within a sweep."""
    from hydra.core.hydra_config import HydraConfig

    from zoo.run.typed import command_words

    argv = command_words()
    program = os.path.basename(argv[0])
    if program.endswith(".py"):
        start = ["python", program] if program != "__main__.py" else ["python", "-m", "zoo"]
    else:
        start = [program]
    if argv[1:2] and argv[1] in ("train", "eval"):
        start.append(argv[1])
    return shlex.join([*start, *HydraConfig.get().overrides.task])


def results_file(cfg: DictConfig) -> str:
    """Where the rows of a run are collected."""
    return str(cfg.get("results") or "results/local/rows.jsonl")


def check_writable(path: str) -> None:
    """Refuses a run whose row could not be written, before it costs hours.

    Raises:
        ZooError: The file cannot be opened for appending.
    """
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(path, "ab"):
            pass
    except OSError as error:
        from zoo.errors import ZooError

        raise ZooError(f"results={path} cannot be written: {error.strerror}") from error


def check_folder(path: str, option: str = "output_dir") -> None:
    """Refuses a training whose model or checkpoints could not be saved, before it costs hours.

    Args:
        path: Of the folder.
        option: What says so.

    Raises:
        ZooError: The folder cannot be made or written to.
    """
    try:
        os.makedirs(path, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        from zoo.errors import ZooError

        raise ZooError(
            f"{option}={path} cannot be written: {error.strerror}; type {option}=FOLDER"
        ) from error


def record(row: Row, cfg: DictConfig) -> str:
    """Appends the row to the collected rows and, in a sweep, to the sweep's own file."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from zoo.results.rows import append_row
    from zoo.run.sweep import sweep_rows_path

    path = results_file(cfg)
    append_row(path, row)
    State.rows_path = path
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        State.rows_path = str(sweep_rows_path(HydraConfig.get()))
        append_row(State.rows_path, row)
    return path


def failed_row(cfg: DictConfig, message: str, status: str = "failed") -> Row:
    """A row that says what was tried; it must be writable whatever went wrong."""
    from omegaconf import OmegaConf

    from zoo.results.rows import new_row

    def plain(key: str) -> Any:
        try:
            node = OmegaConf.select(cfg, key)
            return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
        except Exception:
            return None

    def named(group: str) -> Any:
        """The chosen option as rows hold it: registry name and arguments."""
        node, name = plain(group), _choice(group)
        if not isinstance(node, dict) or name in (None, "none"):
            return None
        if name == "default":  # of the schedules: r alone is short for constant_r
            name, node = "constant_r", node if node.get("r") is not None else {}
        args = {key: value for key, value in node.items() if not key.startswith("_")}
        return {"name": name, **args} if args or group != "schedule" else None

    task, weights, backbone = plain("task") or "train", plain("weights"), plain("backbone.name")
    reducer = named("reducer")
    return new_row(
        status=status,
        error=message,
        command=command_line(),
        task=[task] if isinstance(task, str) else task,
        method=reducer["name"] if reducer else "none",
        reducer=reducer,
        # Without a backbone the weights bring theirs, but they may be what failed to load.
        backbone=str(backbone or weights or "").partition(".")[0] or None,
        dataset=plain("data.name"),
        schedule=named("schedule") if reducer else None,
        seed=plain("seed"),
        weights=None if weights is None else str(weights),
    )


def _choice(group: str) -> str | None:
    """The option of a group that was chosen, e.g. "tome" for the group "reducer"."""
    from hydra.core.hydra_config import HydraConfig

    choice = HydraConfig.get().runtime.choices.get(group)
    return None if choice is None else str(choice)
