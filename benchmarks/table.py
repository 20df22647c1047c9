"""The tables of docs/performance.md and docs/deploy.md, from the rows of the suites.

`python -m benchmarks.table results/speed/acceptance.jsonl` (or `modes.jsonl`) prints what follows
from them, `--write` puts it into the pages.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import modes_table
from benchmarks.acceptance import AT_1, AT_16, BASE, METHODS, SMALL
from benchmarks.jobs import FRACTION
from benchmarks.markdown import markdown
from benchmarks.models import backbone_name
from zoo.results.rows import read_rows

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
DEPLOY = PAGE.with_name("deploy.md")
BEGIN, END = "<!-- efficiencies: python -m benchmarks.table -->", "<!-- end of efficiencies -->"

Row = Mapping[str, Any]


def table(rows: Sequence[Row]) -> str:
    """Markdown: one line per method, inference without run-time options."""
    found = {
        (row["backbone"], row["batch"], row["method"]): row
        for row in rows
        if row["bench"]["mode"] == "inference" and not row["runtime"]
    }
    places = [(backbone, batch) for backbone in (SMALL, BASE) for batch in (16, 1)]
    names = {SMALL: "DeiT-S", BASE: "DeiT-B"}
    head = ["method", *(f"{names[backbone]}, batch {batch}" for backbone, batch in places)]
    head += ["over the straightforward form, batch 16, 1", "peak memory / dense"]
    lines = [head]
    for method in METHODS:
        mine = {(b, n): found.get((backbone_name(b), n, method)) for b, n in places}
        cells = [method]
        for (_, batch), row in mine.items():
            target = (AT_16 if batch > 1 else AT_1)[method]
            cells.append(_efficiency(row, target))
        small = [row["bench"] for batch in (16, 1) if (row := mine[SMALL, batch])]
        cells.append(", ".join(f"{bench['over_straightforward']:.3f}" for bench in small))
        cells.append(_memory(mine[SMALL, 16]))
        lines.append(cells)
    return markdown(lines)


def _efficiency(row: Row | None, target: float) -> str:
    if row is None:
        return ""
    value = row["bench"]["efficiency"]
    return f"{value:.3f} ({'≥' if value >= target else '**<**'} {target:g})"


def _memory(row: Row | None) -> str:
    if row is None or not row["peak_mem_mb"]:
        return ""
    return f"{row['peak_mem_mb'] / row['peak_mem_mb_dense']:.3f}"


def inserted(page: str, text: str, begin: str = BEGIN, end: str = END) -> str:
    """The page with the table between its marks."""
    before, _, rest = page.partition(begin)
    _, _, after = rest.partition(end)
    return f"{before}{begin}\n{text}\n{end}{after}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line."""
    usage = argparse.ArgumentParser(prog="python -m benchmarks.table", description=__doc__)
    usage.add_argument("rows", type=Path)
    usage.add_argument("--write", action="store_true", help="change the pages in docs/")
    options = usage.parse_args(arguments)
    rows = read_rows(options.rows)
    parts = [(PAGE, table, BEGIN, END)]
    if modes := modes_table.of_modes(rows):
        rows = list(modes)
        if all(row["bench"].get("fraction", FRACTION) != FRACTION for row in rows):
            print(
                f"{options.rows} holds no rows at {FRACTION} of the GMACs, which these pages show; "
                "others stand in docs/leaderboard.md: python -m benchmarks.leaderboard --write",
                file=sys.stderr,
            )
            return 2
        parts = [
            (PAGE, modes_table.modes_table, modes_table.BEGIN, modes_table.END),
            (
                DEPLOY,
                modes_table.deployed_table,
                modes_table.DEPLOYED,
                modes_table.END_OF_DEPLOYED,
            ),
        ]
    for page, make, begin, end in parts:
        text = make(rows)
        if options.write:
            old = page.read_text(encoding="utf-8")
            page.write_text(inserted(old, text, begin, end), encoding="utf-8")
        else:
            print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
