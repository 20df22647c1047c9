"""Sizes in the attention, and dropped tokens handed on: the tables of docs/size-bias.md.

    python -m benchmarks.size_bias --write

makes them from the rows in results/size_bias, which these commands append:

    python eval.py experiment=size_bias/digits
    python eval.py -m experiment=size_bias/digits reducer=topk,random reducer.settle=nearest
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.table import inserted
from zoo.results.rows import read_rows

ROOT = Path(__file__).parents[1]
PAGE, ROWS = ROOT / "docs" / "size-bias.md", ROOT / "results" / "size_bias"
NAMES = ("dinov2", "digits")


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: a line per method, the paper's choice marked.

    Args:
        rows: Of one tower; of rows for one setting the last counts.
    """
    found = {_setting(row): row for row in rows if row["status"] == "ok"}
    lines = [
        "| method | sizes in the attention | dropped tokens | GMACs | k-NN by the dense gallery | "
        "95 % | answers as dense | centred cosine | worst image |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (method, sizes, settle), row in found.items():
        knn, cosine = row["knn"], row["centred_cosine"] or {}
        low, high = knn["ci95"]
        cells = [
            method if method != "none" else "dense",
            "" if method == "none" else sizes,
            "" if settle is None else settle,
            f"{row['gmacs']['total']:.3g}",
            f"{knn['top1']:.1f}",
            f"{low:.1f} to {high:.1f}",
            *(_number(knn.get("agreement"), ".1f"),),
            *(_number(cosine.get(key), ".3f") for key in ("mean", "worst")),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _setting(row: Mapping[str, Any]) -> tuple[str, str, str | None]:
    reducer = row["reducer"] or {}
    asked = reducer.get("prop_attn")
    sizes = "yes" if asked is True else "no" if asked is False else "as published"
    settle = reducer.get("settle")
    return str(row["method"]), sizes, settle if settle != "drop" else None


def _number(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"


def write_tables(page: str, folder: Path = ROWS) -> str:
    """The page with its tables from the rows of a folder."""
    for name in NAMES:
        marks = (f"<!-- {name}: python -m benchmarks.size_bias -->", f"<!-- end of {name} -->")
        page = inserted(page, table(read_rows(folder / f"{name}.jsonl")), *marks)
    return page


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line."""
    usage = argparse.ArgumentParser(prog="python -m benchmarks.size_bias")
    usage.add_argument("--write", action="store_true", help="change docs/size-bias.md")
    if usage.parse_args(arguments).write:
        PAGE.write_text(write_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print("\n\n".join(table(read_rows(ROWS / f"{name}.jsonl")) for name in NAMES))
    return 0


if __name__ == "__main__":
    sys.exit(main())
