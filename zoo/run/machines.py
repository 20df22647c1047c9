"""Several processes, on one machine or more: Lightning starts them and brings them together."""

from __future__ import annotations

import contextlib
import logging
import os
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from zoo.errors import ZooError
from zoo.measure.device import pick_device
from zoo.measure.processes import ALONE, Processes, is_agreed, portable
from zoo.measure.progress import show, wanted
from zoo.run.outcome import started
from zoo.run.schema.sense import WHERE

if TYPE_CHECKING:
    from lightning.fabric import Fabric
    from omegaconf import DictConfig

Row = dict[str, Any]
Work = Callable[["DictConfig", Processes, torch.device], Row]

_SHARING = ("auto", "ddp", "ddp_spawn", "ddp_fork", "ddp_notebook")


def by_processes(cfg: DictConfig, work: Work) -> Row:
    """Does an evaluation, in as many processes as were asked for or have been started.

    Args:
        cfg: configs/eval.yaml, composed.
        work: A function of a module, given the configuration, this process among the others, and
            its device.

    Returns:
        What it returned in the first process, in this one; in others of one command that row, too.

    Raises:
        ZooError: The processes cannot be started, or one of them failed.
    """
    trainer = cfg.get("trainer")
    if trainer is None and started() == 1:
        return work(cfg, ALONE, pick_device(str(cfg.device)))
    fabric = _fabric(cfg)
    in_process: Callable[..., Any] = _in_process  # Fabric hands the arguments on
    row, problem = fabric.launch(in_process, work, cfg)
    if problem is not None:
        if fabric.global_rank > 0:
            return {"status": "failed"}  # which the first process says
        raise problem
    return row  # type: ignore[no-any-return]


def where(trainer: Mapping[str, Any]) -> dict[str, Any]:
    """Where a trainer runs: as told, and under torchrun in what that has started.

    Raises:
        ZooError: It has started another number of processes than the options say.
    """
    found = {name: trainer[name] for name in WHERE if trainer.get(name) is not None}
    count = started()
    if count == 1:
        return found
    local = int(os.environ.get("LOCAL_WORLD_SIZE", count))
    # One device is what a trainer has by default, and auto is one process on a CPU.
    if str(found.get("devices", 1)) in ("1", "auto", "-1"):
        found["devices"] = local
    if found.get("num_nodes", 1) == 1:
        found["num_nodes"] = count // local
    devices = found["devices"]
    number = len(devices) if isinstance(devices, list) else devices
    if str(number).isdecimal() and int(number) * found["num_nodes"] != count:
        raise ZooError(
            f"torchrun has started {count} processes, {local} on this machine, and "
            f"trainer.devices={devices} trainer.num_nodes={found['num_nodes']} are "
            f"{int(number) * found['num_nodes']}; leave these options out"
        )
    return found


def _fabric(cfg: DictConfig) -> Fabric:
    """What starts the processes of an evaluation.

    Raises:
        ZooError: The options do not fit.
    """
    from lightning.fabric import Fabric
    from omegaconf import OmegaConf

    trainer: Any = {"accelerator": "auto", "strategy": "ddp"}
    if cfg.get("trainer") is not None:
        trainer = OmegaConf.to_container(cfg.trainer, resolve=True)
        if str(cfg.device) != "auto":
            raise ZooError(
                f"device={cfg.device} and trainer=...: the trainer chooses devices; leave device "
                "out, or type trainer.accelerator and trainer.devices"
            )
    elif str(cfg.device) != "auto":
        trainer["accelerator"] = pick_device(str(cfg.device)).type
    strategy = trainer.get("strategy") or "auto"
    if strategy not in _SHARING:
        raise ZooError(
            f"trainer.strategy={_shown(strategy)}: eval.py shares images out among processes, each "
            "with the whole model; type trainer=ddp"
        )
    quiet()
    try:
        return Fabric(**where(trainer))
    except (RuntimeError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        if "No supported gpu" in reason:
            reason = "there is no GPU; type trainer.accelerator=cpu trainer.devices=2"
        raise ZooError(f"the processes cannot be started: {reason}") from error


def _shown(strategy: Any) -> str:
    target = strategy.get("_target_") if isinstance(strategy, Mapping) else None
    return str(target or strategy)


def _in_process(fabric: Fabric, work: Work, cfg: DictConfig) -> tuple[Row | None, Exception | None]:
    """Does the work in one of the processes; all of them know of the failure of one."""
    processes = Processes(fabric.global_rank, fabric.world_size)
    show(wanted(cfg))
    try:
        with _unheard() if processes.rank else contextlib.nullcontext():
            row = _together(processes, lambda: work(cfg, processes, fabric.device))
    except Exception as error:
        if not isinstance(error, (ZooError, OSError)):
            traceback.print_exc()
        return None, portable(error)
    return row, None


def _together(processes: Processes, work: Callable[[], Row]) -> Row:
    """Ends in all processes alike: one that has failed meets the others at what they share."""
    if processes.size == 1:
        return work()
    try:
        row = work()
    except Exception as error:
        if is_agreed(error):
            raise
        problem = error

        def fail() -> Row:
            raise problem

        return processes.collect(fail)[0]
    return processes.collect(lambda: row)[0]


@contextlib.contextmanager
def _unheard() -> Iterator[None]:
    """Within, a process says nothing that the first one says, too."""
    show(False)
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            yield
    finally:
        logging.disable(level)


def quiet() -> None:
    """Lightning says much about itself."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
