"""What was typed, where a job runs: Hydra's launchers take singletons along to other processes."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence

from hydra.core.singleton import Singleton


class Typed(metaclass=Singleton):
    """The command of a run; of a sweep, where this is one of its jobs.

    Attributes:
        argv: As the shell gave it, with the sub-command of `zoo`; None before a command began.
        full_error: The user asked for tracebacks.
    """

    def __init__(self) -> None:
        self.argv: list[str] | None = None
        self.full_error = False


def typed() -> Typed:
    """The command of this process, or of the one that has sent this job."""
    return Typed()


def command_words() -> list[str]:
    """Its words."""
    return list(typed().argv or sys.argv)


def overrides_of(command: str) -> list[str]:
    """What was typed in the command of a row: its options.

    >>> overrides_of("zoo eval weights=vit_digits 'task=[accuracy,flops]'")
    ['weights=vit_digits', 'task=[accuracy,flops]']
    """
    return options(shlex.split(command))


def options(words: Sequence[str]) -> list[str]:
    """The words of a command line that set an option."""
    return [word for word in words if "=" in word or word[:1] == "~"]
