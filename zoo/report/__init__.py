"""Reports on result rows: console table, CSV, Markdown, an interactive page and a picture."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["ReportPaths", "table", "write_report"]

TITLE = "Token reduction: accuracy against cost"


class ReportPaths(NamedTuple):
    """Files that `write_report` wrote."""

    html: Path
    csv: Path
    markdown: Path
    png: Path


def write_report(
    rows: str | os.PathLike[str] | Iterable[Mapping[str, Any]],
    out_dir: str | os.PathLike[str],
    title: str = TITLE,
    published: str | os.PathLike[str] | None = None,
) -> ReportPaths:
    """Write ``report.html``, ``report.csv``, ``report.md`` and ``report.png``.

    Args:
        rows: Rows, or the ``.jsonl`` file or folder to read them from; broken lines are left out,
            with a warning.
        out_dir: Folder to write to; made if it does not exist, files of an older report are
            replaced.
        title: Heading of the report.
        published: Folder with `published.yaml`: the numbers of others on ImageNet, which the page
            then shows in a plot of their own. None is the folder of the rows, if it has one.

    Raises:
        ZooError: There are no rows, the packages that draw are not installed, or ``out_dir``
            cannot be written. Nothing is written then.
    """
    from zoo.errors import ZooError
    from zoo.report.published import FILE, read
    from zoo.report.words import printable
    from zoo.results.rows import plain, readable_rows

    missing = [name for name in ("plotly", "matplotlib") if not importlib.util.find_spec(name)]
    if missing:
        names = " and ".join(missing)
        raise ZooError(f"a report needs {names}; install with: pip install 'tokenzoo[report]'")
    if isinstance(rows, (str, os.PathLike)):
        where, found = f" in {os.fspath(rows)}", readable_rows([rows])
    else:
        where, found = "", [plain(row) for row in rows]
    if published is None and isinstance(rows, (str, os.PathLike)):
        published = rows if (Path(rows) / FILE).is_file() else None
    if not found:
        raise ZooError(f"a report needs at least one row, found none{where}; run eval.py first")

    from zoo.report.compare import compare
    from zoo.report.html import html_page
    from zoo.report.png import write_png
    from zoo.report.spreadsheet import csv_table
    from zoo.report.tables import markdown_table

    others = None if published is None else read(Path(published))
    comparison, title = compare(found), printable(title)
    out = Path(out_dir)
    paths = ReportPaths(*(out / f"report.{end}" for end in ("html", "csv", "md", "png")))
    texts = {
        paths.html: html_page(comparison, title, out, others),
        paths.csv: csv_table(comparison),
        paths.markdown: markdown_table(comparison, title),
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        for path, text in texts.items():
            with _replacing(path) as scratch:
                scratch.write_text(text, encoding="utf-8", newline="\n")
        with _replacing(paths.png) as scratch:
            write_png(comparison, scratch, title)
    except OSError as problem:
        raise ZooError(f"cannot write the report to {out}: {problem.strerror}") from problem
    return paths


def table(rows: Iterable[Mapping[str, Any]]) -> str:
    """A plain-text table of rows for the console; see `zoo.report.tables.table`."""
    from zoo.report import tables
    from zoo.results.rows import plain

    return tables.table([plain(row) for row in rows])


class _replacing:
    """Write beside the file and rename, so that no reader ever sees half a report."""

    def __init__(self, path: Path) -> None:
        self.path, self.scratch = path, path.with_name(f".{path.name}.{os.getpid()}")

    def __enter__(self) -> Path:
        return self.scratch

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            os.replace(self.scratch, self.path)
        else:
            self.scratch.unlink(missing_ok=True)
