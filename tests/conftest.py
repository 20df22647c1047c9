"""Fixtures of many files."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

import pytest

from tests.commands import Run

# Two processes that each start one thread per core would fight for the cores. OpenMP reads this
# when torch is first imported, here and in the commands that tests start.
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(workers))))


@pytest.fixture(autouse=True)
def no_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """No Hydra job is running here, whatever another test has run in this process before."""
    if (hydra := sys.modules.get("hydra.core.hydra_config")) is not None:
        monkeypatch.setattr(hydra.HydraConfig.instance(), "cfg", None)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs `zoo ARGUMENTS` in an empty folder; returns exit code, stdout, stderr."""
    from zoo.cli.main import main

    monkeypatch.chdir(tmp_path)

    def call(line: str) -> tuple[int, str, str]:
        code = main(shlex.split(line))
        out, err = capsys.readouterr()
        return code, out, err

    return call
