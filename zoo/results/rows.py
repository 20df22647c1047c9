"""Result rows: one JSON object per line, one line per run, never rewritten.

Every run of `train.py` and `eval.py` appends one row to a ``*.jsonl`` file; every table and
picture is generated from such files by `zoo.report`. `FIELDS` is the schema. A row holds every
field, ``None`` where a run did not measure it, so that two rows can always be put side by side.

This module imports neither torch nor timm, so that reading and printing results stays instant.
"""

from __future__ import annotations

import difflib
import functools
import json
import math
import os
import platform
import secrets
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from statistics import NormalDist
from typing import Any

from zoo.report.words import printable
from zoo.results.fields import FIELDS

__all__ = [
    "FIELDS",
    "Row",
    "append_row",
    "new_row",
    "plain",
    "read_rows",
    "readable_rows",
    "wilson_interval",
]

Row = dict[str, Any]
_DEEP = 100  # levels in a row; how many Python would take depends on who else runs here

STATUSES = ("ok", "failed", "skipped")

# What a run measures: a number that is none makes the row a failure.
_MEASURED = (
    *("gmacs", "gmacs_sample", "top1", "top5", "top1_start", "ci95", "fidelity"),
    *("knn", "linear_probe", "retrieval", "zeroshot", "select", "centred_cosine"),
    *("imgs_per_s", "imgs_per_s_dense", "ms", "by_batch"),
)

_PACKAGES = ("torch", "timm", "lightning", "tokenzoo")


def _error(message: str) -> Exception:
    # Imported when needed: the error classes live in `reduction`, which may bring torch along.
    from zoo.errors import ZooError

    return ZooError(message)


# ------------------------------------------------------------------------------- making rows


def new_row(**known: Any) -> Row:
    """Make a complete row from what a run knows.

    Args:
        **known: Values of fields in `FIELDS`. What is left out of ``run_id``, ``created``,
            ``status``, ``command``, ``versions``, ``git`` and ``dirty`` is filled in; every
            other field left out is None. A measurement that is NaN or infinite makes the row a
            failure.

    Returns:
        A dict with exactly the keys of `FIELDS`, of plain JSON types.

    Raises:
        TypeError: A keyword is not a field.
        ZooError: ``status`` is none of `STATUSES`.

    >>> row = new_row(method="tome", backbone="deit_small_patch16_224", top1=79.5)
    >>> row["status"], row["top1"], row["top5"]
    ('ok', 79.5, None)
    """
    for name in known:
        if name not in FIELDS:
            near = difflib.get_close_matches(name, FIELDS, n=2)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise TypeError(
                f"{name!r} is not a field of a result row{hint} (see zoo.results.rows.FIELDS)"
            )
    now = datetime.now(timezone.utc)
    row: Row = dict.fromkeys(FIELDS)
    row.update(
        run_id=f"{now:%Y%m%dT%H%M%S}-{secrets.token_hex(3)}",
        status="ok",
        created=now.isoformat(timespec="milliseconds"),
        command=_command_line(),
        versions=_versions(),
    )
    row["git"], row["dirty"] = _checkout()
    row.update({name: plain(value) for name, value in known.items()})
    if row["status"] not in STATUSES:
        kinds = ", ".join(map(repr, STATUSES))
        raise _error(f"status of a row must be one of {kinds}, got {row['status']!r}")
    lost = [name for name in _MEASURED if _not_finite(known.get(name))]
    if lost and row["status"] == "ok":
        # As None it would look like something that nobody measured.
        words = f"{', '.join(lost)} {'is' if len(lost) == 1 else 'are'} no finite number"
        row.update(status="failed", error=words)
    return row


def _not_finite(value: Any) -> bool:
    """Whether there is a NaN or an infinity in a value."""
    if isinstance(value, Mapping):
        return any(map(_not_finite, value.values()))
    if isinstance(value, (list, tuple)):
        return any(map(_not_finite, value))
    if hasattr(value, "tolist"):
        return _not_finite(value.tolist())
    return isinstance(value, float) and not math.isfinite(value)


def plain(value: Any) -> Any:
    """Turn a value into JSON types: numpy and torch scalars to numbers, NaN to None, paths to str.

    >>> plain({"a": (1, float("nan")), "b": Path("x")})
    {'a': [1, None], 'b': 'x'}
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(plain(item) for item in value)
    if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray)):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):  # numpy and torch, scalars and arrays
        return plain(value.tolist())
    return str(value)


def _command_line() -> str:
    program, *rest = sys.argv or [""]
    module = getattr(sys.modules.get("__main__"), "__spec__", None)
    if module is not None and module.name and os.path.isabs(program) and program.endswith(".py"):
        # Started with -m, which puts the file's own path in place of the module's name.
        return shlex.join(["python", "-m", module.name.removesuffix(".__main__"), *rest])
    if program.endswith(".py"):
        return shlex.join(["python", program, *rest])
    return shlex.join([Path(program).name, *rest])


@functools.lru_cache(maxsize=1)
def _installed() -> tuple[tuple[str, str | None], ...]:
    found: list[tuple[str, str | None]] = [("python", platform.python_version())]
    for package in _PACKAGES:
        try:
            found.append((package, metadata.version(package)))
        except metadata.PackageNotFoundError:
            # Run from a checkout that is not installed: the package itself knows.
            own = getattr(sys.modules.get("zoo"), "__version__", None)
            found.append((package, own if package == "tokenzoo" else None))
    return tuple(found)


def _versions() -> dict[str, str | None]:
    return dict(_installed())


@functools.lru_cache(maxsize=1)
def _checkout() -> tuple[str | None, bool | None]:
    """Commit and state of the checkout this package runs from, (None, None) if from none.

    Cached: the code that runs is the code that was loaded, whatever is committed meanwhile.
    """
    root = Path(__file__).resolve().parents[2]
    # Only our own checkout counts: installed into somebody's repository we are not its commit.
    if not (root / ".git").exists():
        return None, None

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *arguments],
            check=True,
            capture_output=True,
            text=True,
            timeout=10,
        ).stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
        return commit, bool(git("status", "--porcelain", "--", "reduction", "zoo", "configs"))
    except (OSError, subprocess.SubprocessError):
        return None, None


def wilson_interval(k: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of a success rate, in **percent**, as rows hold it.

    Args:
        k: Successes, e.g. images classified correctly.
        n: Trials, at least 1.
        confidence: Coverage, in (0, 1).

    Raises:
        ZooError: ``k`` is outside [0, n], ``n`` is below 1, or ``confidence`` outside (0, 1).

    >>> tuple(round(x, 2) for x in wilson_interval(50, 100))
    (40.38, 59.62)
    """
    if n < 1 or not 0 <= k <= n:
        raise _error(f"expected 0 <= k <= n with n >= 1, got k={k}, n={n}")
    if not 0 < confidence < 1:
        raise _error(f"confidence must be in (0, 1), got {confidence}")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    rate = k / n
    middle = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    # At k = 0 and k = n one end is exactly 0 and 100; rounding must not move it past that.
    low = 0.0 if k == 0 else max(0.0, middle - half)
    high = 1.0 if k == n else min(1.0, middle + half)
    return 100 * low, 100 * high


# --------------------------------------------------------------------------- files of rows


def append_row(path: str | os.PathLike[str], row: Mapping[str, Any]) -> Path:
    """Append one row to a ``.jsonl`` file, creating it and its folders.

    Safe when several processes append to one file: the line goes out in one write to a file
    opened for appending, under a lock where the system has one. Nothing that is there is touched.

    Returns:
        The path that was written.

    Raises:
        ZooError: The file cannot be written.
    """
    path = Path(path)
    line = json.dumps(plain(row), ensure_ascii=False, allow_nan=False) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    except OSError as problem:
        reason = problem.strerror
        raise _error(f"cannot write results to {path}: {reason}; choose another file") from problem
    try:
        _lock(handle)
        # A writer killed half-way leaves a line without its end; do not glue this row to it.
        size = os.fstat(handle).st_size
        if size:
            os.lseek(handle, size - 1, os.SEEK_SET)
            if os.read(handle, 1) != b"\n":
                line = "\n" + line
        # File names need not be UTF-8; what stands for their bytes is \udce9, an escape of JSON.
        rest = line.encode("utf-8", "backslashreplace")
        while rest:
            rest = rest[os.write(handle, rest) :]
    except OSError as problem:
        raise _error(f"cannot write results to {path}: {problem.strerror}") from problem
    finally:
        os.close(handle)  # releases the lock
    return path


def _lock(handle: int) -> None:
    try:
        import fcntl
    except ImportError:  # Windows: the single write has to do
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
    except OSError:  # a file system without locks: the single write has to do
        pass


def read_rows(path: str | os.PathLike[str], broken: list[str] | None = None) -> list[Row]:
    """Read every row of a ``.jsonl`` file, or of all such files below a folder, oldest first.

    Fields that an older version did not write are None; fields this version does not know are kept.

    Args:
        path: A file or a folder.
        broken: Takes what is wrong with a line that is no row (its file and number, and what it
            holds), and the line is left out. None: such a line is an error.

    Raises:
        ZooError: The path does not exist, a folder holds no ``.jsonl`` file, or a line is not a
            JSON object (the message names file and line).
    """
    return _oldest_first(row for file in _files(path) for row in _read_file(file, broken))


def _files(path: str | os.PathLike[str]) -> list[Path]:
    path = Path(path)
    if path.is_dir():
        files = sorted(path.rglob("*.jsonl"))
        if not files:
            raise _error(
                f"no results: expected *.jsonl files in {path}, found none; "
                "make some with `python eval.py`"
            )
        return files
    if path.exists():
        return [path]
    raise _error(f"no results: {path} does not exist; expected a .jsonl file or a folder")


def _oldest_first(rows: Iterable[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: str(row.get("created") or ""))


def readable_rows(paths: Iterable[str | os.PathLike[str]]) -> list[Row]:
    """Read what can be read of files and folders, of several machines maybe, each run once.

    A run is in more than one file where these were copied, or where a sweep has one of its own; it
    is known by `run_id`. One warning on stderr counts broken lines.

    Raises:
        ZooError: A path does not exist, or a folder holds no ``.jsonl`` file.
    """
    broken: list[str] = []
    # However often a file was named, or a folder around it.
    files = {file.resolve(): file for path in paths for file in _files(path)}
    rows = joined(row for file in files.values() for row in _read_file(file, broken))
    if broken:
        more = f" (and {len(broken) - 1} more such lines)" if len(broken) > 1 else ""
        print(f"warning: left out {printable(broken[0])}{more}", file=sys.stderr)
    return rows


def joined(rows: Iterable[Row]) -> list[Row]:
    """Rows of several files, each run once, oldest first.

    A run has one `run_id` and one time; two machines may have drawn the same name. Of two rows of
    one run the later one read counts. Rows without a name are runs of their own.

    >>> one = {"run_id": "a", "created": "2026-01-01"}
    >>> len(joined([one, dict(one), {"run_id": None}, {"run_id": None}]))
    3
    """
    found: dict[Any, Row] = {}
    for row in rows:
        name = row.get("run_id")
        key = len(found) if name is None else (str(name), str(row.get("created")))
        found[key] = row
    return _oldest_first(found.values())


def _read_file(file: Path, broken: list[str] | None) -> Iterable[Row]:
    try:
        lines = file.read_bytes().split(b"\n")
    except OSError as problem:
        raise _error(f"cannot read results from {file}: {problem.strerror}") from problem
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8-sig"), parse_constant=lambda _: None)
            row = None if _levels(row) > _DEEP else plain(row)
        except (ValueError, RecursionError):  # JSON and UTF-8 errors, or a thousand brackets
            row = None
        if isinstance(row, dict):
            yield {**dict.fromkeys(FIELDS), **row}
            continue
        what = f"{file}:{number}: expected one JSON object, got {_excerpt(line)}"
        if broken is None:
            raise _error(f"{what}; delete or repair that line")
        broken.append(what)


def _levels(value: Any) -> int:
    """How deep lists and mappings lie in each other, without a call for each level."""
    level, found = [value], 0
    while level := [item for item in level if isinstance(item, (dict, list))]:
        found += 1
        level = [x for item in level for x in (item.values() if isinstance(item, dict) else item)]
    return found


def _excerpt(line: bytes) -> str:
    text = line.strip().decode("utf-8", errors="replace")
    return repr(text if len(text) <= 40 else text[:37] + "...")
