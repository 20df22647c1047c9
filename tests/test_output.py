"""A stdout that nobody reads, or that is full, loses no row; lists are printed without torch."""

from __future__ import annotations

import errno
import io
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import reduction
import zoo
from zoo.cli.main import main
from zoo.results.rows import read_rows

ROOT = Path(zoo.__file__).resolve().parents[1]
EVAL = "eval weights=vit_digits reducer=tome schedule.r=2 task=flops"
SWEEP = "eval -m weights=vit_digits reducer=tome,topk task=flops control=[] hydra.sweep.dir=sweep"
BATCHES = " ".join(f"trainer.limit_{part}_batches=1" for part in ("train", "val", "test"))
TRAIN = f"train trainer.max_epochs=1 {BATCHES} progress=true"


class Broken(io.StringIO):
    """A stream that takes some text, or none, before the reader goes or the disk is full."""

    def __init__(self, code: int, after: int) -> None:
        super().__init__()
        self.code, self.after = code, after

    def write(self, text: str) -> int:
        if self.tell() + len(text) > self.after:
            raise OSError(self.code, os.strerror(self.code))
        return super().write(text)

    def flush(self) -> None:
        if self.tell() >= self.after:
            raise OSError(self.code, os.strerror(self.code))


@pytest.mark.parametrize(
    ("line", "rows", "after"), [(EVAL, 1, 0), (EVAL, 1, 20), (SWEEP, 2, 0), (TRAIN, 1, 0)]
)
@pytest.mark.parametrize(("problem", "code"), [(errno.EPIPE, 0), (errno.ENOSPC, 1)])
def test_a_row_is_written_whatever_becomes_of_the_output(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
    line: str,
    rows: int,
    problem: int,
    code: int,
    after: int,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdout", Broken(problem, after))
    assert main(shlex.split(line)) == code
    found = read_rows(tmp_path / "results" / "local" / "rows.jsonl")
    assert [row["status"] for row in found] == ["ok"] * rows
    said = [text for text in capsys.readouterr().err.splitlines() if text.startswith("error")]
    full = ["error: the output cannot be written: No space left on device"]
    assert said == ([] if code == 0 else full)
    if "-m" in line:
        assert len(read_rows(tmp_path / "sweep" / "rows.jsonl")) == rows
        assert (tmp_path / "sweep" / "report.html").is_file()


def test_a_row_is_written_where_bars_have_nowhere_to_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, Broken(errno.EPIPE, 0))
    assert main([*shlex.split(TRAIN)]) == 0
    assert main([*shlex.split(EVAL), "task=[accuracy,fidelity]", "limit=9", "progress=true"]) == 0
    assert len(read_rows(tmp_path / "results" / "local" / "rows.jsonl")) == 2


def test_where_the_files_of_a_run_cannot_go_it_says_what_to_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("outputs").touch()
    assert main(shlex.split(EVAL)) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "outputs" in line and "Errno" not in line
    assert line.endswith("type paths.outputs=FOLDER")
    assert main(shlex.split(f"{EVAL} paths.outputs=elsewhere")) == 0


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
@pytest.mark.parametrize(
    ("shell", "code"),
    [("> /dev/full", 1), ("| head -0", 0), (">&-", 0), (">&- 2>&-", 0), ("> /dev/full 2>&1", 1)],
)
def test_the_same_in_a_shell(tmp_path: Path, shell: str, code: int) -> None:
    command = f"set -o pipefail; {sys.executable} {ROOT / 'eval.py'} {EVAL[5:]} {shell}"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    [row] = read_rows(tmp_path / "results" / "local" / "rows.jsonl")
    assert row["status"] == "ok"


# ------------------------------------------------------------------------------------- at once


PROGRAM = """
import sys
from zoo.cli.main import main
code = main(sys.argv[1:])
heavy = {"torch", "timm", "lightning", "torchvision", "fvcore", "numpy"} & set(sys.modules)
sys.exit(code or (f"imported {heavy}" if heavy else 0))
"""


def at_once(*arguments: str) -> str:
    """What `zoo ARGUMENTS` prints, which is printed without importing anything that takes time."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, ""), arguments
    return done.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        "list",
        "list --models",
        "list --json",
        "list --models --json",
        "list tom* --json",
        "--help",
        "list --help",
        "show --help",
        "report --help",
    ],
)
def test_lists_are_printed_without_torch_in_80_columns(arguments: str) -> None:
    out = at_once(*arguments.split())
    assert out.strip()
    if "--json" not in arguments:
        assert max(map(len, out.splitlines())) <= 80


def test_methods_are_shown_without_torch_in_80_columns() -> None:
    """All in one process: every page, as `zoo show NAME` prints it."""
    names = reduction.list_methods()
    program = PROGRAM.replace(
        "code = main(sys.argv[1:])",
        "code = max(main(['show', name, *j]) for name in sys.argv[1:] for j in ([], ['--json']))",
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *names], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    pages = [line for line in done.stdout.splitlines() if not line.startswith((" ", "{", "}", '"'))]
    assert len(pages) >= len(names)
    wide = [line for line in done.stdout.splitlines() if len(line) > 80]
    # What cannot be broken, an address, may stick out; values of JSON are not broken.
    assert not [line for line in wide if '":' not in line and " " in line.strip()]


def test_an_unknown_method_is_answered_without_torch() -> None:
    program = PROGRAM.replace("sys.exit(code or ", "assert code == 2\nsys.exit(")
    done = subprocess.run(
        [sys.executable, "-c", program, "show", "tomme"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    [line] = done.stderr.splitlines()
    assert "did you mean 'tome'" in line
