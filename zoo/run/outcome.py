"""How a command ends: exit codes, and what has to be handed around Hydra."""

from __future__ import annotations

import os
import sys

# The exit codes: 1 = a bug or a failed job of a sweep, 2 = something to type differently,
# 130 = Ctrl-C (128 + SIGINT, what shells expect).
FAILED, USAGE, INTERRUPTED = 1, 2, 130


class State:
    """What jobs leave for the end of the command."""

    failed_jobs: int = 0
    report_failed: bool = False
    rows_path: str | None = None


def report_failed(message: str) -> None:
    """Says that a sweep has no report, and lets the command fail at its end."""
    State.report_failed = True
    complain(message)


def complain(message: str) -> int:
    """Says what to type differently; returns the exit code for it."""
    print(f"error: {message}", file=sys.stderr)
    return USAGE


def started() -> int:
    """How many processes were started for this run from outside, by torchrun or the like."""
    if "RANK" in os.environ and "LOCAL_RANK" in os.environ:
        return int(os.environ.get("WORLD_SIZE", 1))
    return 1


def is_first_process(distributed: bool = True) -> bool:
    """Whether this process speaks for all of a run.

    Args:
        distributed: Whether tasks of SLURM are processes of one run; else each is a run of its own.
    """
    rank = _torch_rank()
    if rank is not None:
        return rank == 0
    names = ["RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK"]
    names += ["SLURM_PROCID"] if distributed else []
    return all(os.environ.get(name, "0") == "0" for name in names)


def _torch_rank() -> int | None:
    """Its number, where torch knows it."""
    if "torch" not in sys.modules:
        return None
    from torch import distributed

    if not (distributed.is_available() and distributed.is_initialized()):
        return None
    return distributed.get_rank()
