"""How tests type commands."""

from __future__ import annotations

from collections.abc import Callable

#: Runs `zoo ARGUMENTS`; the answer is the exit code, stdout and stderr.
Run = Callable[[str], tuple[int, str, str]]
