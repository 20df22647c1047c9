"""The leaderboards: tables of docs/leaderboard.md from their rows, and single rows run again.

    python -m benchmarks.leaderboard --write

makes the tables from the rows that these commands append:

    python eval.py experiment=leaderboard/fashion
    python eval.py experiment=leaderboard/dinov2 weights=FILE
    python eval.py experiment=leaderboard/selectors weights=FILE
    python -m benchmarks.trained
    python -m benchmarks.speed --suite modes --fraction 0.75 0.5 0.35 --only dinov2_small
    python -m benchmarks.speed --suite modes --fraction 0.5 --reducers untrained --modes eager

`--quick` runs a few points of the first table again and says of each whether it falls inside the
95 % interval of the committed row; `--again RUN_ID` does so with any row.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import agreement, methods_table, modes, modes_table, standings
from benchmarks.standings import budget, good, is_dense, options, share
from benchmarks.table import inserted
from zoo.results.rows import read_rows, wilson_interval

ROOT = Path(__file__).parents[1]
PAGE, ROWS = ROOT / "docs" / "leaderboard.md", ROOT / "results" / "leaderboard"
FASHION, TRAINED = ROWS / "fashion.jsonl", ROWS / "fashion_trained.jsonl"
DINOV2, GALLERIES = ROWS / "dinov2.jsonl", ROWS / "dinov2_galleries.jsonl"
SELECTORS = ROWS / "selectors.jsonl"
# Methods that `--quick` runs at half the cost: both ends of the table, and tokens drawn by lot.
QUICK = ("tome", "topk", "evit", "pitome", "random")

Row = Mapping[str, Any]


# ------------------------------------------------------------------------------------- the page


def _rows(file: Path) -> list[dict[str, Any]]:
    return read_rows(file) if file.is_file() else []


def _fashion(table: Callable[[Sequence[Row]], str]) -> Callable[[], str]:
    return lambda: table(_rows(FASHION))


def _dinov2(table: Callable[[Sequence[Row], str], str], dataset: str) -> Callable[[], str]:
    return lambda: table(_rows(DINOV2), dataset)


def _galleries(dataset: str) -> Callable[[], str]:
    return lambda: agreement.gallery_table([*_rows(DINOV2), *_rows(GALLERIES)], dataset)


TABLES: Mapping[str, Callable[[], str]] = {
    "fashion": _fashion(standings.fashion_table),
    "controls": _fashion(standings.control_table),
    "precision": _fashion(standings.precision_table),
    "sizes": _fashion(standings.sizes_table),
    "trained": lambda: standings.trained_table(_rows(TRAINED), _rows(FASHION)),
    "dinov2": _dinov2(agreement.agreement_table, "fashion_mnist"),
    "dinov2 resolution": _dinov2(agreement.resolution_table, "fashion_mnist"),
    "dinov2 galleries": _galleries("fashion_mnist"),
    "clip art": _dinov2(agreement.agreement_table, "openclipart"),
    "clip art resolution": _dinov2(agreement.resolution_table, "openclipart"),
    "clip art galleries": _galleries("openclipart"),
    "selectors": lambda: agreement.selector_table(_rows(SELECTORS)),
    "speed of all": lambda: methods_table.methods_tables(
        _rows(ROOT / modes.POINTS), _rows(FASHION), _rows(DINOV2)
    ),
    "speed": lambda: modes_table.points_table(_rows(ROOT / modes.POINTS)),
}


def write_tables(page: str) -> str:
    """The page with its tables from the committed rows."""
    for name, table in TABLES.items():
        marks = f"<!-- {name}: python -m benchmarks.leaderboard -->", f"<!-- end of {name} -->"
        if marks[0] in page:
            page = inserted(page, table(), *marks)
    return page


# -------------------------------------------------------------------------------------- again


def chosen_quickly(rows: Sequence[Row]) -> list[Row]:
    """The committed rows that `--quick` runs again, the dense model first."""
    rows = good(rows)
    dense = [r for r in rows if is_dense(r)]
    full = max((r["gmacs"]["total"] for r in dense), default=None)
    found = [r for r in dense if r["gmacs"]["total"] == full][:1]
    for method in QUICK:
        same = [r for r in rows if r["method"] == method and budget(r) == 0.5 and not options(r)]
        found += [r for r in same if r["seed"] == 0][:1]
    return found


def run_again(row: Row, folder: Path) -> Row:
    """Run the command of a row, and return the new row.

    Raises:
        RuntimeError: It fails, or leaves no row.
    """
    file = folder / f"{row['run_id']}.jsonl"
    words = [w for w in shlex.split(row["command"]) if not w.startswith(("results=", "done="))]
    words = [sys.executable, *words[1:], f"results={file}", "progress=false"]
    if "train.py" not in words:
        words += ["done=again", "control=[]"]  # controls have rows, and commands, of their own
    subprocess.run(words, cwd=ROOT, check=False, stdout=subprocess.DEVNULL)
    found = read_rows(file) if file.is_file() else []
    if not found or found[-1]["status"] != "ok":
        raise RuntimeError(f"{shlex.join(words)} left no row")
    return found[-1]


def measured(row: Row) -> tuple[str, float, tuple[float, float]]:
    """What a row is about: its name, in percent, and the 95 % interval."""
    if row["top1"] is not None:
        return "top-1", row["top1"], tuple(row["ci95"])
    if row["select"]:
        kept = row["select"]["by_keep"][-1]
        same, count = kept["selector"]["agreement"], row["select"]["n_images"]
        around = wilson_interval(round(same * count / 100), count)
        return f"answers as dense by {kept['keep']} tokens", same, around
    knn = row["knn"]
    if knn is None:
        crop = row["retrieval"]["crop"]
        return "other crop found first", crop["recall1"], tuple(crop["recall1_ci95"])
    if "agreement" in knn:
        return "answers as dense", knn["agreement"], tuple(knn["agreement_ci95"])
    return "top-1 of neighbours", knn["top1"], tuple(knn["ci95"])


def verdict(old: Row, new: Row) -> tuple[bool, str]:
    """Whether a new row falls inside the interval of a committed one, and a line that says so."""
    name, _, (low, high) = measured(old)
    value = measured(new)[1]
    inside = bool(low <= value <= high)
    if old["select"]:
        what = old["select"]["selector"]["name"]
    elif is_dense(old):
        what = "dense"
    elif old["gmacs_dense"]:
        what = f"{old['method']} at {share(old):.0f} %"
    else:  # an architecture of its own
        what = f"{old['method']} at {old['gmacs']['total']:.3f} GMACs"
    said = "inside" if inside else "OUTSIDE"
    return inside, f"{what}: {name} {value:.2f}, {said} [{low:.2f}, {high:.2f}]"


def again(rows: Sequence[Row]) -> int:
    """Run rows again; 1 where one falls outside, or there are none."""
    if not rows:
        print("no such rows: expected run_ids of results/leaderboard", file=sys.stderr)
        return 1
    good_ones = True
    with tempfile.TemporaryDirectory() as folder:
        for row in rows:
            inside, line = verdict(row, run_again(row, Path(folder)))
            good_ones &= inside
            print(line, flush=True)
    return 0 if good_ones else 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line."""
    usage = argparse.ArgumentParser(prog="python -m benchmarks.leaderboard")
    usage.add_argument("--write", action="store_true", help="change docs/leaderboard.md")
    usage.add_argument("--quick", action="store_true", help="run a few points again")
    usage.add_argument("--again", nargs="+", metavar="RUN_ID", help="run these rows again")
    given = usage.parse_args(arguments)
    if given.quick:
        return again(chosen_quickly(_rows(FASHION)))
    if given.again:
        files = sorted(ROWS.glob("*.jsonl"))
        return again([r for f in files for r in read_rows(f) if r["run_id"] in given.again])
    if given.write:
        PAGE.write_text(write_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print("\n\n".join(table() for table in TABLES.values()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
