"""What a sweep (`-m`) adds to its jobs: its own file of rows and the report at its end."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.experimental.callback import Callback

from zoo.run.launchers import Follower, elsewhere
from zoo.run.outcome import started

if TYPE_CHECKING:
    from omegaconf import DictConfig


def sweep_rows_path(hydra: Any) -> Path:
    """Returns the file that holds the rows of one sweep, in the folder of that sweep."""
    return Path(str(hydra.sweep.dir)) / "rows.jsonl"


def refuse_subprocess_ddp(cfg: DictConfig, kind: str) -> None:
    """Refuses a job of a sweep that would start the sweep again, once per device.

    Args:
        cfg: Of the job.
        kind: "eval" or "train", which takes no processes started by Python.

    Raises:
        SystemExit: The trainer's strategy launches its processes by repeating the command, and the
            command holds the sweep, which ends here.
        ZooError: The same of a job in a process of its own, whose end would tell the sweep nothing.
    """
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    strategy = OmegaConf.select(cfg, "trainer.strategy")
    # Where the processes are there already, nothing is repeated.
    if strategy is None or started() > 1 or int(os.environ.get("SLURM_NTASKS", 1)) > 1:
        return
    if isinstance(strategy, str) and (
        not strategy.startswith(("auto", "ddp", "fsdp", "deepspeed"))
        or strategy.endswith(("_spawn", "_fork", "_notebook"))
    ):
        return
    if _devices(cfg) == 1:
        return
    name = strategy if isinstance(strategy, str) else strategy.get("_target_")
    message = (
        f"-m with trainer.strategy={name} on several devices would start the whole sweep once per "
        f"device; {'type trainer.strategy=ddp_spawn, ' if kind == 'eval' else ''}give each job "
        "several processes by hydra/launcher=submitit_slurm hydra.launcher.tasks_per_node=2 (or "
        "submitit_local), or run the jobs one by one with torchrun"
    )
    if not elsewhere(HydraConfig.get()):
        raise SystemExit(message)
    from zoo.errors import ZooError

    raise ZooError(message)


def _devices(cfg: DictConfig) -> int:
    from omegaconf import OmegaConf

    devices = OmegaConf.select(cfg, "trainer.devices", default=1)
    if OmegaConf.is_list(devices):
        return len(devices)
    if str(devices) not in ("auto", "-1"):
        return int(devices)
    if OmegaConf.select(cfg, "trainer.accelerator", default="auto") == "cpu":
        return 1
    import torch

    return max(1, torch.cuda.device_count())


class ProgressCallback(Callback):
    """Counts the jobs of a sweep in a bar on stderr, where bars show.

    What jobs in other processes have found is said here.
    """

    def __init__(self) -> None:
        self._bar: Any = None
        self._follower: Follower | None = None

    def __reduce__(self) -> tuple[type[ProgressCallback], tuple[()]]:
        """Launchers send it along with their jobs, which have nothing to count."""
        return type(self), ()

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Starts the bar."""
        from zoo.measure.progress import counter, show, wanted

        show(wanted(config))
        self._bar = counter("jobs", count_jobs(swept(config.hydra)))
        if elsewhere(config.hydra):
            self._follower = Follower(sweep_rows_path(config.hydra), self._bar.update)
            self._follower.start()

    def on_job_end(self, config: DictConfig, job_return: Any, **kwargs: Any) -> None:
        """Moves it on."""
        if self._bar is not None:
            self._bar.update()

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Takes it away."""
        if self._follower is not None:
            self._follower.stop()
        if self._bar is not None:
            self._bar.close()


def swept(hydra: Any) -> list[str]:
    """The overrides of a whole sweep: what an experiment brings along, then what was typed."""
    params = hydra.sweeper.get("params") or {}
    return [*(f"{name}={value}" for name, value in params.items()), *hydra.overrides.task]


def count_jobs(overrides: list[str]) -> int:
    """How many jobs the overrides of a sweep make: the product of the values of each.

    Of two for one option the last holds.
    """
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.override_parser.overrides_parser import OverridesParser

    # Only with a loader is glob(*) known to stand for something.
    parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
    last = {o.get_key_element(): o for o in parser.parse_overrides(overrides)}.values()
    return math.prod(len(list(o.sweep_iterator())) for o in last if o.is_sweep_override())


class ReportCallback(Callback):
    """Writes the report when the last job of a sweep has ended.

    Args:
        also: Files or folders of rows that the report shows beside those of the sweep, e.g. of
            models trained earlier. Only rows of the sweep's data sets are taken.
    """

    def __init__(self, also: str | list[str] | None = None) -> None:
        self.also = [also] if isinstance(also, str) else list(also or ())

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Prints the table and the path of the report; the rows stay whatever happens here."""
        from zoo.results.rows import readable_rows
        from zoo.run.messages import explain
        from zoo.run.outcome import report_failed

        path = sweep_rows_path(config.hydra)
        # Hydra 1.4 comes here after Ctrl-C, too, while the interrupt is on its way.
        if not path.exists() or isinstance(sys.exc_info()[1], KeyboardInterrupt):
            return
        from zoo.run.controls import add_controls

        add_controls(config, path)
        try:
            rows = readable_rows([path])
            data = {str(row["dataset"]) for row in rows}
            rows += [row for row in readable_rows(self.also) if str(row["dataset"]) in data]
            from zoo.report import table, write_report

            paths = write_report(rows, path.parent, title=_title(rows))
            print(table(rows))
        except Exception as error:
            # Hydra would turn this into a warning with a type name; say what to do instead.
            message = explain(error) or f"{type(error).__name__}: {error}"
            report_failed(f"no report: {message}; the rows are in {path}")
            return
        print(f"rows:   {path}\nreport: {paths.html}")


def _title(rows: list[dict[str, Any]]) -> str:
    names = sorted({str(row["backbone"]) for row in rows if row.get("backbone")})
    data = sorted({str(row["dataset"]) for row in rows if row.get("dataset")})
    return " on ".join(part for part in (", ".join(names[:3]), ", ".join(data[:3])) if part)
