"""The leaderboards: tables of docs/leaderboard.md from their rows, and single rows run again.

    python -m benchmarks.leaderboard --write

makes the tables from results/leaderboard, whose rows these commands append:

    python eval.py experiment=leaderboard/fashion
    python eval.py experiment=leaderboard/dinov2 weights=FILE

`--quick` runs a few points of the first table again and says of each whether it falls inside the
95 % interval of the committed row; `--again RUN_ID` does so with any row.
"""

from __future__ import annotations

import argparse
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.table import inserted
from zoo.results.answers import compared
from zoo.results.rows import read_rows

ROOT = Path(__file__).parents[1]
PAGE, ROWS = ROOT / "docs" / "leaderboard.md", ROOT / "results" / "leaderboard"
FASHION, DINOV2 = ROWS / "fashion.jsonl", ROWS / "dinov2.jsonl"
# Methods that `--quick` runs at half the cost: both ends of the table, and tokens drawn by lot.
QUICK = ("tome", "topk", "evit", "pitome", "random")
_OPTION = re.compile(r"\breducer\.(\w+)=(\S+)")
NOISE = 0.05  # a p below which two methods are said to differ

Row = Mapping[str, Any]


def good(rows: Iterable[Row]) -> list[Row]:
    """Rows that measured something; of rows for one job the last."""
    return list({(r["job"], r["seed"]): r for r in rows if r["status"] == "ok"}.values())


def share(row: Row) -> float:
    """GMACs in percent of the dense model's at its own image size."""
    return 100 * float(row["gmacs"]["total"]) / float(row["gmacs_dense"])


def budget(row: Row) -> float | None:
    """The fraction that was asked for."""
    return (row["schedule"] or {}).get("fraction")


def is_dense(row: Row) -> bool:
    """Whether nothing is reduced, at whatever image size."""
    return bool(row["method"] == "none")


def options(row: Row) -> dict[str, str]:
    """Arguments of the method that were typed, such as `prop_attn=true`."""
    return dict(_OPTION.findall(row["command"] or ""))


# ------------------------------------------------------------------------------ classification


def fashion_table(rows: Sequence[Row]) -> str:
    """Markdown: top-1 of every method at every budget, the best at half the cost first.

    Args:
        rows: Of the leaderboard on Fashion-MNIST, as they were appended.
    """
    rows = [row for row in good(rows) if not is_dense(row) and not options(row)]
    budgets = sorted({b for row in rows if (b := budget(row))}, reverse=True)
    found: dict[str, dict[float, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if fraction := budget(row):
            found[row["method"]][fraction].append(row)
    middle = 0.5 if 0.5 in budgets else (budgets or [None])[0]
    heads = [f"{100 * b:g} %" for b in budgets]
    rest = ["95 % at 50 %", "ToMe is right alone", "it is right alone", "p"]
    lines = ["| " + " | ".join(["method", *heads, *rest]) + " |", "|---" * (len(heads) + 5) + "|"]

    def best(name: str) -> float:
        at = found[name].get(middle, []) if middle else []
        return -_mean(at) if at else 0.0

    for name in sorted(found, key=lambda n: (best(n), n)):
        cells = [f"[`{name}`](methods/{name}.md)"]
        cells += [_top1(found[name].get(b, []), b) for b in budgets]
        at = found[name].get(middle, []) if middle else []
        cells.append(_interval(at[0]) if at else "")
        cells += _paired(found.get("tome", {}).get(middle, []), at) if middle else ["", "", ""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def sizes_table(rows: Sequence[Row]) -> str:
    """Markdown: top-1 with and without sizes in the attention, where both were run.

    Args:
        rows: Of the leaderboard on Fashion-MNIST, as they were appended.
    """
    found: dict[tuple[str, float], dict[str, Row]] = defaultdict(dict)
    for row in good(rows):
        asked = options(row).get("prop_attn", "").lower()
        if asked in ("true", "false") and (fraction := budget(row)):
            found[row["method"], fraction][asked] = row
    heads = ["method", "budget", "with sizes", "without", "right alone with", "without", "p"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for (method, fraction), pair in sorted(found.items()):
        if len(pair) == 2:
            on, off = pair["true"], pair["false"]
            cells = [f"[`{method}`](methods/{method}.md)", f"{100 * fraction:g} %"]
            cells += [f"{row['top1']:.2f}" for row in (on, off)] + _paired([on], [off])
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def control_table(rows: Sequence[Row]) -> str:
    """Markdown: the dense model, the same at lower resolution, and smaller models."""
    lines = ["| control | pixels | GMACs | of the dense cost | top-1 | 95 % |", "|---" * 6 + "|"]
    dense = [row for row in good(rows) if is_dense(row)]
    full = max((row["gmacs"]["total"] for row in dense), default=1.0)
    for row in sorted(dense, key=lambda r: -r["gmacs"]["total"]):
        total = row["gmacs"]["total"]
        cells = [
            f"`{row['backbone']}`, dense",
            str(row["img_size"]),
            f"{total:.3f}",
            f"{100 * total / full:.0f} %",
            f"{row['top1']:.2f}",
            _interval(row),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _mean(rows: Sequence[Row]) -> float:
    return statistics.fmean(row["top1"] for row in rows)


def _top1(rows: Sequence[Row], asked: float) -> str:
    if not rows:
        return ""
    text = f"{_mean(rows):.2f}"
    if len(rows) > 1:
        text += f" ± {statistics.stdev(row['top1'] for row in rows):.2f}"
    cost = statistics.fmean(share(row) for row in rows)
    return text if abs(cost - 100 * asked) < 1.5 else f"{text} ({cost:.0f} %)"


def _interval(row: Row) -> str:
    low, high = row["ci95"]
    return f"{low:.1f} to {high:.1f}"


def _paired(ours: Sequence[Row], theirs: Sequence[Row]) -> list[str]:
    """Images that only one of two models gets right, and how probable that is by chance."""
    test = compared(ours[0], theirs[0]) if ours and theirs else None
    if test is None or ours[0] is theirs[0]:
        return ["", "", ""]
    p = f"{test.p:.2f}" if test.p >= 0.01 else f"{test.p:.0e}".replace("e-0", "e-")
    p = p if test.p else "< 1e-300"  # beyond what a float holds
    return [str(test.first), str(test.second), p if test.p >= NOISE else f"**{p}**"]


# ------------------------------------------------------------------------------------- features


def dinov2_table(rows: Sequence[Row]) -> str:
    """Markdown: agreement with the dense tower, with and without sizes in the attention.

    Args:
        rows: Of the leaderboard on DINOv2, as they were appended.
    """
    found: dict[tuple[str, str], dict[float, Row]] = defaultdict(dict)
    budgets = sorted({b for row in good(rows) if (b := budget(row))}, reverse=True)
    for row in good(rows):
        if (fraction := budget(row)) and not is_dense(row):
            found[_who(row), _sizes(row)][fraction] = row
    heads = [f"answers as dense, {100 * b:g} %" for b in budgets]
    last = budgets[-1] if budgets else 0.0
    rest = ["centred cosine", "worst image"]
    heads = ["method", "sizes", *heads, *(f"{name}, {100 * last:g} %" for name in rest)]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]

    def best(key: tuple[str, str]) -> float:
        row = found[key].get(last)
        return -row["knn"]["agreement"] if row else 0.0

    for key in sorted(found, key=lambda k: (best(k), k)):
        at = found[key].get(last)
        cells = [*key, *(_agreement(found[key].get(b), b) for b in budgets)]
        cosine = (at or {}).get("centred_cosine") or {}
        cells += [_number(cosine.get(name), ".3f") for name in ("mean", "worst")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _who(row: Row) -> str:
    reducer = dict(row["reducer"] or {})
    settle = reducer.get("settle")
    name = f"[`{row['method']}`](methods/{row['method']}.md)"
    return f"{name}, settle=nearest" if settle == "nearest" else name


def _sizes(row: Row) -> str:
    asked = (row["reducer"] or {}).get("prop_attn")
    return {True: "yes", False: "no"}.get(asked, "as published")


def _agreement(row: Row | None, asked: float) -> str:
    if row is None:
        return ""
    text = f"{row['knn']['agreement']:.1f}"
    cost = share(row)
    return text if abs(cost - 100 * asked) < 1.5 else f"{text} ({cost:.0f} %)"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"


# ------------------------------------------------------------------------------------- the page

TABLES = {
    "fashion": (fashion_table, FASHION),
    "controls": (control_table, FASHION),
    "sizes": (sizes_table, FASHION),
    "dinov2": (dinov2_table, DINOV2),
}


def write_tables(page: str) -> str:
    """The page with its tables from the committed rows."""
    for name, (table, file) in TABLES.items():
        if file.is_file():
            marks = f"<!-- {name}: python -m benchmarks.leaderboard -->", f"<!-- end of {name} -->"
            page = inserted(page, table(read_rows(file)), *marks)
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
    words = [sys.executable, *words[1:], f"results={file}", "done=again", "progress=false"]
    words.append("control=[]")  # those of a sweep have rows, and commands, of their own
    subprocess.run(words, cwd=ROOT, check=False, stdout=subprocess.DEVNULL)
    found = read_rows(file) if file.is_file() else []
    if not found or found[-1]["status"] != "ok":
        raise RuntimeError(f"{shlex.join(words)} left no row")
    return found[-1]


def verdict(old: Row, new: Row) -> tuple[bool, str]:
    """Whether a new row falls inside the interval of a committed one, and a line that says so."""
    if old["top1"] is not None:
        name, low, high, value = "top-1", *old["ci95"], new["top1"]
    else:
        name, value = "answers as dense", new["knn"]["agreement"]
        low, high = old["knn"]["agreement_ci95"]
    inside = bool(low <= value <= high)
    what = "dense" if is_dense(old) else f"{old['method']} at {share(old):.0f} %"
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
        return again(chosen_quickly(read_rows(FASHION)))
    if given.again:
        files = sorted(ROWS.glob("*.jsonl"))
        return again([r for f in files for r in read_rows(f) if r["run_id"] in given.again])
    if given.write:
        PAGE.write_text(write_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print("\n\n".join(table(read_rows(f)) for table, f in TABLES.values() if f.is_file()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
