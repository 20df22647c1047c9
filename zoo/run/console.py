"""A terminal, pipe or file that takes no more output ends nothing: the work goes on."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

from zoo.run.outcome import FAILED


class Steady:
    """A text stream around another one that goes on when nobody takes what is written.

    Attributes:
        problem: Why the stream does not take any more, or None.
    """

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.problem: Exception | None = None

    def write(self, text: str) -> int:
        """Writes, or drops the text where that has failed before."""
        if self.stream is not None and self.problem is None:
            try:
                self.stream.write(text)
            except UnicodeEncodeError:
                # A terminal of another encoding shows what it can.
                encoding = self.stream.encoding or "ascii"
                self.stream.write(text.encode(encoding, "replace").decode(encoding))
            except (OSError, ValueError) as problem:
                self._give_up(problem)
        return len(text)

    def flush(self) -> None:
        """Hands on what was written."""
        if self.stream is not None and self.problem is None:
            try:
                self.stream.flush()
            except (OSError, ValueError) as problem:
                self._give_up(problem)

    def _give_up(self, problem: Exception) -> None:
        self.problem = problem
        # What is left in buffers would fail once more when Python flushes them at its end.
        with contextlib.suppress(OSError, ValueError, AttributeError):
            handle = os.open(os.devnull, os.O_WRONLY)
            os.dup2(handle, self.stream.fileno())
            os.close(handle)

    def isatty(self) -> bool:
        """Whether somebody watches."""
        return bool(self.stream is not None and self.problem is None and self.stream.isatty())

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def written_out(command: Callable[[], int]) -> int:
    """Runs a command whose output may be cut off (`zoo list | head`) and returns its exit code.

    A reader that has gone is no failure. A full disk behind stdout is one, said on stderr.
    """
    with _steady() as out:
        code = command()
        out.flush()
        gone = getattr(out.problem, "errno", None) == errno.EPIPE
        if out.problem is None or gone:
            return code
        reason = getattr(out.problem, "strerror", None) or out.problem
        print(f"error: the output cannot be written: {reason}", file=sys.stderr)
        return code or FAILED


@contextlib.contextmanager
def _steady() -> Iterator[Steady]:
    _fill_closed()
    before = sys.stdout, sys.stderr
    out = Steady(sys.stdout)
    sys.stdout, sys.stderr = out, Steady(sys.stderr)  # type: ignore[assignment]
    try:
        yield out
    finally:
        with contextlib.suppress(Exception):
            sys.stderr.flush()
        sys.stdout, sys.stderr = before


def _fill_closed() -> None:
    """Opens what the shell has closed (`>&-`): else the next file would become stdout."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
