"""Sweeps by Hydra's launchers: jobs that run in other processes, or on other machines."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from zoo.measure.progress import say
from zoo.run.outcome import State, started
from zoo.run.typed import overrides_of

# What brings each launcher, and the extra of ours that installs it.
_PLUGINS = {
    "joblib": ("hydra_joblib_launcher", "joblib"),
    "submitit_local": ("hydra_submitit_launcher", "submitit"),
    "submitit_slurm": ("hydra_submitit_launcher", "submitit"),
    "ray": ("hydra_ray_launcher", "ray"),
    "ray_aws": ("hydra_ray_launcher", "ray"),
}
_GROUP = "hydra/launcher"
# Of those whose jobs write to files of their own what they have to say.
_OWN_OUTPUT = ("LocalLauncher", "SlurmLauncher")


def refuse(arguments: Sequence[str]) -> str | None:
    """The message for a launcher that cannot be, else None.

    Args:
        arguments: Of the command line, without the program.
    """
    sweep = _is_sweep(arguments)
    for text in arguments:
        key, equals, name = text.lstrip("+").partition("=")
        if key != _GROUP or not equals:
            continue
        plugin, extra = _PLUGINS.get(name, (None, None))
        if plugin is not None and not _installed(plugin):
            return f"{_GROUP}={name} needs a plugin: pip install 'tokenzoo[{extra}]'"
        if not sweep:
            return f"{_GROUP}={name} has no effect without -m: a launcher runs the jobs of a sweep"
    if sweep and started() > 1:
        return (
            "-m under torchrun would run the whole sweep in each process; run a sweep by itself "
            f"(jobs side by side: -m {_GROUP}=joblib), or its jobs one by one with torchrun"
        )
    return None


def _is_sweep(arguments: Sequence[str]) -> bool:
    long = (a for a in arguments if a[:3] == "--m")
    return (
        "-m" in arguments
        or any("--multirun".startswith(a) for a in long)
        or any(a.partition("=")[0].lstrip("+") == "hydra.mode" and "MULTI" in a for a in arguments)
    )


def _installed(plugin: str) -> bool:
    try:
        return importlib.util.find_spec(f"hydra_plugins.{plugin}") is not None
    except ModuleNotFoundError:  # nor any other plugin
        return False


def elsewhere(hydra: Any) -> bool:
    """Whether the jobs of a sweep run in other processes than the sweep."""
    return not str(hydra.launcher.get("_target_")).endswith("BasicLauncher")


def speaks(hydra: Any) -> bool:
    """Whether a job prints its own line; of the others the sweep prints it."""
    return not elsewhere(hydra) or str(hydra.launcher.get("_target_")).endswith(_OWN_OUTPUT)


def join_tasks() -> None:
    """Tells Lightning of the other tasks of this job, where submitit has started several here.

    On a cluster Lightning knows them from SLURM.
    """
    if os.environ.get("SUBMITIT_EXECUTOR") != "local" or "RANK" in os.environ:
        return
    import submitit

    if submitit.JobEnvironment().num_tasks > 1:
        submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False)


class Follower:
    """Says what jobs elsewhere have found, as their rows arrive in the file of the sweep.

    Args:
        path: Of that file.
        seen: Is called for each row.
        pause: Seconds between two looks.
    """

    def __init__(self, path: Path, seen: Callable[[], None], pause: float = 0.5) -> None:
        self.path, self.seen, self.pause = path, seen, pause
        self._offset = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True, name="rows of a sweep")

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def stop(self) -> None:
        """End, after what has come so far."""
        self._over.set()
        self._thread.join()
        self._look()

    def _follow(self) -> None:
        while not self._over.wait(self.pause):
            self._look()

    def _look(self) -> None:
        try:
            with open(self.path, "rb") as file:
                file.seek(self._offset)
                new = file.read()
        except OSError:
            return  # nothing yet
        whole = new[: new.rfind(b"\n") + 1]
        self._offset += len(whole)
        for line in whole.splitlines():
            with contextlib.suppress(ValueError):  # half a line of a job that was killed
                row = json.loads(line)
                if isinstance(row, dict):
                    self._say(row)
                    self.seen()

    def _say(self, row: dict[str, Any]) -> None:
        from zoo.report.words import printable, summary_line

        State.rows_path = str(self.path)
        if row.get("status") != "failed":
            say(summary_line(row))
            return
        State.failed_jobs += 1
        overrides = " ".join(overrides_of(str(row.get("command") or "")))
        say(f"error: {printable(str(row.get('error')))} [{overrides}]", sys.stderr)
