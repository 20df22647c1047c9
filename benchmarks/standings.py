"""Tables of the leaderboards of classifiers, from their rows."""

from __future__ import annotations

import re
import shlex
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.markdown import markdown
from zoo.results.answers import compared

_OPTION = re.compile(r"\breducer\.(\w+)=(\S+)")
NOISE = 0.05  # a p below which two methods are said to differ

Row = Mapping[str, Any]


def good(rows: Iterable[Row]) -> list[Row]:
    """Rows that measured something; of rows for one job the last."""
    kept = [row for row in rows if row["status"] == "ok"]
    return list({(r["job"] or r["command"], r["seed"]): r for r in kept}.values())


def share(row: Row) -> float:
    """GMACs in percent of the dense model's at its own image size."""
    return 100 * float(row["gmacs"]["total"]) / float(row["gmacs_dense"])


def budget(row: Row) -> float | None:
    """The fraction that was asked for."""
    return (row["schedule"] or {}).get("fraction")


def is_dense(row: Row) -> bool:
    """Whether nothing is reduced, at whatever image size."""
    return bool(row["method"] == "none")


def _whole(row: Row) -> bool:
    """Whether the model is vit_fashion at its own image size."""
    return bool(row["backbone"] == "vit_fashion" and row["img_size"] == 28)


def options(row: Row) -> dict[str, str]:
    """Arguments of the method that were typed, such as `prop_attn=true`."""
    return dict(_OPTION.findall(row["command"] or ""))


def linked(name: str) -> str:
    """A method's name, leading to its page."""
    return f"[`{name}`](methods/{name}.md)"


# ------------------------------------------------------------------------------ classification


def fashion_table(rows: Sequence[Row]) -> str:
    """Markdown: top-1 of every method at every budget, the best at half the cost first.

    Args:
        rows: Of the leaderboard on Fashion-MNIST, as they were appended.
    """
    rows = [row for row in good(rows) if not is_dense(row) and not options(row)]
    rows = [row for row in rows if row["weights_dtype"] == "bfloat16"]
    budgets = sorted({b for row in rows if (b := budget(row))}, reverse=True)
    found: dict[str, dict[float, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if fraction := budget(row):
            found[row["method"]][fraction].append(row)
    middle = 0.5 if 0.5 in budgets else (budgets or [None])[0]
    heads = [f"{100 * b:g} %" for b in budgets]
    rest = ["95 % at 50 %", "ToMe is right alone", "it is right alone", "p"]
    lines = [["method", *heads, *rest]]

    def best(name: str) -> float:
        at = found[name].get(middle, []) if middle else []
        return -_mean(at) if at else 0.0

    for name in sorted(found, key=lambda n: (best(n), n)):
        cells = [linked(name)]
        cells += [_top1(found[name].get(b, []), b) for b in budgets]
        at = found[name].get(middle, []) if middle else []
        cells.append(_interval(at[0]) if at else "")
        cells += _paired(found.get("tome", {}).get(middle, []), at) if middle else ["", "", ""]
        lines.append(cells)
    return markdown(lines)


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
    lines = [heads]
    for (method, fraction), pair in sorted(found.items()):
        if len(pair) == 2:
            on, off = pair["true"], pair["false"]
            cells = [linked(method), f"{100 * fraction:g} %"]
            cells += [f"{row['top1']:.2f}" for row in (on, off)] + _paired([on], [off])
            lines.append(cells)
    return markdown(lines)


def control_table(rows: Sequence[Row]) -> str:
    """Markdown: the dense model, the same at lower resolution, and smaller models."""
    lines = [["control", "pixels", "GMACs", "of the dense cost", "top-1", "95 %"]]
    dense = [r for r in good(rows) if is_dense(r) and r["weights_dtype"] == "bfloat16"]
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
        lines.append(cells)
    return markdown(lines)


def precision_table(rows: Sequence[Row]) -> str:
    """Markdown: top-1 in bfloat16 and in float32, where both were run.

    Args:
        rows: Of the leaderboard on Fashion-MNIST, as they were appended.
    """
    found: dict[tuple[str, float], dict[str, Row]] = defaultdict(dict)
    for row in good(rows):
        if _whole(row) and (row["seed"], options(row)) == (0, {}):
            found[row["method"], budget(row) or 1.0][row["weights_dtype"] or "float32"] = row
    heads = ["method", "budget", "float32", "bfloat16", "right alone in float32", "in bfloat16"]
    lines = [[*heads, "p"]]
    for (method, fraction), pair in sorted(found.items()):
        if len(pair) == 2:
            name = "dense" if method == "none" else linked(method)
            both = pair["float32"], pair["bfloat16"]
            cells = [name, f"{100 * fraction:g} %", *(f"{row['top1']:.2f}" for row in both)]
            lines.append(cells + _paired([both[0]], [both[1]]))
    return markdown(lines)


SHORT = "400 steps"  # of experiment=leaderboard/trained, where nothing else is asked for
# What a recipe fits, where it is not the whole model.
_FITTED = {"module=reducer_only": "the reducer", "module=diffrate_search": "the counts"}


def trained_table(rows: Sequence[Row], free: Sequence[Row]) -> str:
    """Markdown: top-1 after a short training, beside that of the same method off the shelf.

    Several seeds have their mean, and the interval of the first.

    Args:
        rows: Of benchmarks.trained.
        free: Of the leaderboard on Fashion-MNIST.
    """
    before = {
        row["method"]: row["top1"]
        for row in good(free)
        if (budget(row) == 0.5 or is_dense(row)) and _whole(row) and not options(row)
        and row["weights_dtype"] == "bfloat16" and row["seed"] == 0
    }  # fmt: skip
    rows = good(rows)
    full = max((row["gmacs"]["total"] for row in rows), default=1.0)
    found: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in sorted(rows, key=lambda r: int(r["seed"])):
        words = shlex.split(row["command"])
        tuned = "experiment=leaderboard/trained" in words
        fitted = next((_FITTED[w] for w in words if w in _FITTED), "everything")
        plugins = [plugin["name"] for plugin in row["recipe"]["plugins"]]
        name = row["backbone"] if is_dense(row) else row["method"]
        shelf = before.get(row["method"]) if tuned and not plugins else None
        what = (
            " + ".join(f"`{part}`" for part in [name, *plugins]) + _geometry(row, tuned),
            fitted if tuned else "everything, from scratch",
            SHORT if row["training"]["epochs"] == 1 else f"{row['training']['epochs']} epochs",
            f"{100 * row['gmacs']['total'] / full:.0f} %",
            number(shelf, ".2f"),
        )
        found[what].append(row)
    heads = ["model", "fitted", "for", "of vit_fashion's GMACs", "off the shelf", "trained", "95 %"]
    best = sorted(found.items(), key=lambda item: -_mean(item[1]))
    return markdown([heads, *([*what, _over_seeds(at), _interval(at[0])] for what, at in best)])


def _geometry(row: Row, tuned: bool) -> str:
    """What tells towers of one name apart: tuned ones have vit_fashion's width and patches."""
    args = row["recipe"]["backbone"]["args"]
    told = []
    if "compressed_grid" in args:
        told.append(f"{' x '.join(map(str, args['compressed_grid']))} compressed tokens")
    if not tuned and "patch_size" in args:
        told.append(f"patches of {args['patch_size']}")
    if not tuned and "embed_dim" in args:
        told.append(f"{args['embed_dim']} wide")
    return "".join(f", {words}" for words in told)


def _mean(rows: Sequence[Row]) -> float:
    return statistics.fmean(row["top1"] for row in rows)


def _over_seeds(rows: Sequence[Row]) -> str:
    text = f"{_mean(rows):.2f}"
    if len(rows) > 1:
        text += f" ± {statistics.stdev(row['top1'] for row in rows):.2f}"
    return text


def _top1(rows: Sequence[Row], asked: float) -> str:
    if not rows:
        return ""
    text = _over_seeds(rows)
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


def number(value: float | None, form: str) -> str:
    """A cell, empty where nothing was measured."""
    return "" if value is None else f"{value:{form}}"
