"""Tables of the speed of every method at the leaderboard's costs, from rows of the suite `modes`.

Where `modes_table` has a line per job and a column per usual method, here a method has a line.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from benchmarks.agreement import of_features
from benchmarks.jobs import METHODS, MODELS, MODES, PRECISIONS
from benchmarks.markdown import markdown
from benchmarks.modes_table import machine_of, of_modes, ok, out_of_reach, where
from benchmarks.standings import budget, good, is_dense, linked, options
from reduction.mixins.adaptive import Adaptive
from reduction.registry import METHODS as REGISTERED

MIDDLE = 0.5  # the cost at which accuracy stands beside the speed, and lines are sorted

SMALLER_IMAGE = "a smaller image"
#: Where the turns of one number lie further apart than this part of it, it is marked.
UNSURE = 0.25

Row = Mapping[str, Any]
#: Precision, mode, alignment, cost: what a column of a table is about.
Column = tuple[str, str, int, float]
Key = tuple[Column, int]  # and the batch size


def methods_tables(
    rows: Sequence[Row], fashion: Sequence[Row] = (), dinov2: Sequence[Row] = ()
) -> str:
    """Markdown: two tables per model and machine, in eager mode at every cost and in other modes.

    Args:
        rows: Of the suite with `--fraction`, as they were appended.
        fashion: Of the leaderboard of the classifier: top-1 that stands beside the speed.
        dinov2: Of the leaderboard of the tower: agreement with the dense one.
    """
    beside = {
        "vit_fashion": ("top-1", top1(fashion)),
        "dinov2_small": ("answers as dense, %", agreement(dinov2)),
    }
    parts = []
    # Only machines that such runs were made on, in that order.
    for machine in dict.fromkeys(machine_of(row) for row in whole_runs(of_modes(rows))):
        here = [row for row in of_modes(rows) if machine_of(row) == machine]
        own = whole_runs(here)
        for model in MODELS:
            if found := [row for row in own if row["bench"]["model"] == model]:
                name, known = beside.get(model, ("", {}))
                parts.append(_tables(model, found, name, known))
        if own and (said := _repeated(here)):
            parts.append(said)
    command = "python -m benchmarks.speed --suite modes --fraction 0.5 --reducers untrained"
    return "\n\n".join(parts) or f"No rows yet: `{command}` writes them."


def whole_runs(rows: Sequence[Row]) -> list[Row]:
    """The rows of runs that measured more than the usual methods, and of the controls."""
    runs: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        runs[str(row["bench"]["job"]), str(row["command"])].append(row)
    known = len(METHODS) + 1  # the dense model
    rows = [row for found in runs.values() if len(found) > known for row in found]
    controls = [row for found in runs.values() for row in found if row["bench"].get("control")]
    return rows + controls


def _repeated(rows: Sequence[Row]) -> str:
    """How far the same number lay apart in two runs, which had other methods side by side."""
    found: dict[tuple[str, str], dict[str, float]] = defaultdict(dict)
    for row in rows:
        if ok(row) and row["method"] != "none":
            key = str(row["bench"]["job"]), str(row["method"])
            found[key][str(row["command"])] = row["bench"]["speedup"]
    apart = [max(v.values()) / min(v.values()) - 1 for v in found.values() if len(v) > 1]
    if not apart:
        return ""
    middle, most = 100 * statistics.median(apart), 100 * max(apart)
    return (
        f"{len(apart)} of the numbers from this machine were measured in two runs: they differ by "
        f"{middle:.1f} % in the median and by {most:.0f} % at most."
    )


def _tables(model: str, rows: Sequence[Row], accuracy: str, known: Mapping[str, str]) -> str:
    found: dict[str, dict[Key, Row]] = defaultdict(dict)
    dense: dict[Key, Row] = {}
    controls: dict[str, str] = {}
    for row in rows:
        b = row["bench"]
        key = (b["precision"], b["kind"], b["align"], b["fraction"]), b["batch"]
        if ok(row):
            dense.setdefault(key, row)  # all rows of a run say how fast the dense model was
        found[_line(row)][key] = row
        if control := b.get("control"):
            at_middle = known.get(control, "") if b["fraction"] == MIDDLE else ""
            controls[_line(row)] = at_middle or controls.get(_line(row), "")
    found.pop("none", None)
    columns = {key[0] for line, own in found.items() if line not in controls for key in own}
    beside = {accuracy: {**known, **controls}} if accuracy else {}
    text = [f"**{MODELS[model][2]}**. {where(rows)}"]
    for name, eager in (("In eager mode:", True), ("In other modes:", False)):
        if shown := sorted((c for c in columns if (c[1] == "eager") is eager), key=_place):
            text += [name, markdown(_lines(found, dense, shown, beside, controls))]
    return "\n\n".join(text)


def _lines(
    found: Mapping[str, Mapping[Key, Row]],
    dense: Mapping[Key, Row],
    shown: Sequence[Column],
    beside: Mapping[str, Mapping[str, str]],
    controls: Iterable[str],
) -> list[list[str]]:
    """Heads, the dense model's times, and the methods that have any here, the fastest first."""
    batches = sorted({batch for _, batch in dense})

    def cells(of: Callable[[Row | None], str], own: Mapping[Key, Row]) -> list[str]:
        return [_pair([of(own.get((column, batch))) for batch in batches]) for column in shown]

    heads = ["method", *(f"{name} at {100 * MIDDLE:g} %" for name in beside)]
    lines = [heads + [_head(column) for column in shown]]
    lines.append(["dense, ms per batch", *("" for _ in beside), *cells(_ms, dense)])
    for line in sorted(found, key=lambda name: (-_fast(found[name]), name)):
        own = {key: row for key, row in found[line].items() if key[0] in shown}
        if any(map(ok, own.values())):
            start = [line if line in controls else _name(line)]
            start += [values.get(line, "") for values in beside.values()]
            lines.append(start + cells(_speed, own))
    return lines


def _fast(own: Mapping[Key, Row]) -> float:
    """The speed-up that lines are sorted by: at the middle cost, eager if it was measured so."""
    by_mode: dict[bool, list[float]] = {True: [], False: []}
    for ((_, mode, _, cost), _), row in own.items():
        if cost == MIDDLE and ok(row):
            by_mode[mode == "eager"].append(row["bench"]["speedup"])
    return max(by_mode[True] or by_mode[False] or [0.0])


def _line(row: Row) -> str:
    """What a line is about: a method, or a control at whatever size."""
    control = row["bench"].get("control")
    if control is None:
        return str(row["method"])
    return SMALLER_IMAGE if control.endswith(" px") else f"`{control}`"


def _place(column: Column) -> tuple[Any, ...]:
    precision, mode, align, cost = column
    return list(MODES).index(mode), align, PRECISIONS.index(precision), -cost


def _head(column: Column) -> str:
    precision, mode, align, cost = column
    words = [precision]
    if mode != "eager":
        words.append(mode if align == 1 else f"{mode}, {align}")
    return f"{', '.join(words)}, {100 * cost:g} %"


def _name(method: str) -> str:
    adaptive = method in REGISTERED.names() and issubclass(REGISTERED.get(method), Adaptive)
    return linked(method) + " \\*" * adaptive


def _pair(cells: Sequence[str]) -> str:
    """Batch 1 / batch 16."""
    return " / ".join(cell or "–" for cell in cells) if any(cells) else ""


def _speed(row: Row | None) -> str:
    if row is None or out_of_reach(row):
        return ""
    if not ok(row):
        return "failed"
    unsure = (row["bench"].get("spread") or 0.0) > UNSURE
    return "~" * unsure + f"{row['bench']['speedup']:.2f}"


def _ms(row: Row | None) -> str:
    if row is None or not ok(row):
        return ""
    return f"{min(row['bench']['ms_dense'].values()):.1f}"


def top1(rows: Sequence[Row], cost: float = MIDDLE) -> dict[str, str]:
    """Top-1 by method at a cost, or control, in the first table; of several seeds the mean."""
    found = defaultdict(list)
    for row in good(rows):
        if row["weights_dtype"] != "bfloat16" or options(row):
            continue
        if is_dense(row):
            whole = row["backbone"] == "vit_fashion"
            found[f"{row['img_size']} px" if whole else row["backbone"]].append(row["top1"])
        elif budget(row) == cost:
            found[row["method"]].append(row["top1"])
    return {method: f"{sum(values) / len(values):.2f}" for method, values in found.items()}


def agreement(rows: Sequence[Row], cost: float = MIDDLE) -> dict[str, str]:
    """Agreement on Fashion-MNIST by method, with sizes where it was published so, or control."""
    found = {}
    for row in of_features(rows, "fashion_mnist"):
        value = f"{row['knn']['agreement']:.1f}"
        if is_dense(row):
            found[f"{row['img_size']} px"] = value
        elif options(row).get("prop_attn", "paper") == "paper" and budget(row) == cost:
            found[row["method"]] = value
    return found
