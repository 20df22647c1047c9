"""A process of a run that ends before its time: said, and written into the row."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from subprocess import Popen
from typing import Any

from zoo.run.outcome import FAILED


def announce(say: Callable[[str], bool]) -> None:
    """Has `say` called when a process that Lightning started for this run has ended.

    Lightning itself ends all others then, this one included, without a word.

    Args:
        say: Is given the words; False if there is nothing left to say and this process ends by
            itself.
    """
    from lightning.fabric.strategies.launchers import subprocess_script as launcher

    observer: Any = getattr(launcher, "_ChildProcessObserver", None)
    if observer is None or not hasattr(observer, "_terminate_all"):
        return  # a Lightning that does otherwise

    class Announcing(observer):  # type: ignore[misc]  # a class only known at run time
        def _terminate_all(self) -> None:
            words = end_of(self._child_processes)
            for process in self._child_processes:
                with contextlib.suppress(OSError):
                    process.kill()
            if say(words):
                for stream in (sys.stdout, sys.stderr):
                    stream.flush()
                os._exit(FAILED)  # the main thread may wait for the dead one for ever

    # The launchers of Fabric and of the Trainer both look it up here.
    setattr(launcher, "_ChildProcessObserver", Announcing)  # noqa: B010


def hear(seconds: float = 10.0) -> None:
    """Waits for what `announce` has to say, which ends this process with it.

    Whoever waits for a process that has ended may notice it before the one that watches.

    Args:
        seconds: At most; the process may be one of another machine, which nobody here watches.
    """
    for thread in threading.enumerate():
        if thread.name == "child-process-observer":
            thread.join(seconds)


def end_of(processes: Sequence[Popen[Any]]) -> str:
    """How the first of several processes that has failed has ended."""
    rank, code = next((i, p.returncode) for i, p in enumerate(processes, start=1) if p.returncode)
    if code < 0:
        try:
            how = f"was killed by {signal.Signals(-code).name}"
        except ValueError:
            how = f"was killed by signal {-code}"
        if code == -signal.SIGKILL:
            how += " (out of memory, maybe)"
    else:
        how = f"ended with exit code {code}"
    return f"process {rank} of this run {how}: the run is over; look at what it said before"
