"""Rows as CSV, one column per value."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from typing import Any

from zoo.report.entry import Comparison
from zoo.report.words import describe_budget
from zoo.results.rows import FIELDS


def _parts(start: str, *names: str) -> tuple[tuple[str, Any], ...]:
    return tuple((f"{start}_{name}", name) for name in names)


_SPREAD: dict[str, tuple[tuple[str, Any], ...]] = {
    "gmacs": (
        ("gmacs", "total"),
        ("gmacs_linear", "linear"),
        ("gmacs_attention", "attention"),
        ("gmacs_reducer", "reducer"),
    ),
    "gmacs_sample": (
        ("gmacs_mean", "mean"),
        ("gmacs_min", "min"),
        ("gmacs_max", "max"),
        ("gmacs_images", "images"),
        ("gmacs_limit", "limit"),
    ),
    "gmacs_paper": (("gmacs_paper", "total"), ("gmacs_paper_convention", "convention")),
    "fidelity": (
        ("fidelity_agreement", "agreement"),
        ("fidelity_kl", "kl"),
        ("fidelity_cosine", "cosine"),
    ),
    "ci95": (("ci95_low", 0), ("ci95_high", 1)),
    "knn": _parts("knn", "k", "temperature", "top1", "ci95", "agreement", "agreement_ci95"),
    "linear_probe": _parts("probe", "c", "top1", "ci95", "agreement", "agreement_ci95"),
    "retrieval": tuple(
        (f"{kind}_{name}", (kind, name))
        for kind in ("class", "crop")
        for name in ("recall1", "recall5", "map", "n_queries", "n_gallery")
    ),
    "zeroshot": _parts("zeroshot", "top1", "top5", "ci95", "text"),
    "centred_cosine": _parts("centred_cosine", "mean", "worst", "worst_image"),
    "versions": tuple(
        (f"version_{name}", name) for name in ("python", "torch", "timm", "lightning", "tokenzoo")
    ),
}
_DERIVED = (
    *("budget", "control", "gmacs_saved_percent", "top1_delta", "speedup", "efficiency"),
    *("speedup_timm", "efficiency_timm"),
    *("current", "pareto", "pareto_untrained", "runs", "top1_mean", "top1_spread"),
)


def csv_table(comparison: Comparison) -> str:
    """Every row, failed and repeated ones too, one column per value.

    Mappings become columns (``gmacs_linear``, ``version_torch``), lists stay JSON. The last columns
    are derived: the budget in words, savings and differences against the dense model, whether
    the row counts (``current``: the latest of each run), whether it is on the Pareto front of
    accuracy against GMACs, over everything and over what nobody trained for the purpose, and how
    many runs with other seeds there are, with mean and standard deviation of their top-1.
    """
    extra = sorted({key for row in comparison.rows for key in row} - set(FIELDS))
    columns = [name for key in FIELDS for name, _ in _SPREAD.get(key, ((key, None),))]
    entries = {id(r): e for e in comparison.entries for r in (e.row, *e.runs.values())}
    # The wide views over several backbones come last: a row's own front is its backbone's.
    views = [view for view in comparison.views if not view.combined]
    fronts = [{id(e) for v in views for e in v.front}]
    fronts += [{id(e) for v in views for e in v.front_untrained}]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*columns, *extra, *_DERIVED])
    for row in comparison.rows:
        entry = entries.get(id(row))
        derived: list[Any] = [entry.budget if entry else describe_budget(row.get("schedule"))]
        if entry:
            speed = entry.speeds[next(iter(entry.speeds))] if entry.speeds else None
            derived += [entry.control, entry.saved, entry.delta]
            derived += [speed and speed.speedup, speed and speed.efficiency]
            derived += [speed and speed.over_timm, speed and speed.efficiency_over_timm, True]
            derived += [id(entry) in front for front in fronts]
            count = entry.count if entry.runs or entry.quality else None
            derived += [count, entry.top1, entry.spread]
        else:
            derived += [*[None] * 7, False, False, False, None, None, None]
        values = [value for key in FIELDS for value in _flat(key, row.get(key))]
        values += [row.get(key) for key in extra]
        writer.writerow([_cell(value) for value in [*values, *derived]])
    return text.getvalue()


def _flat(key: str, value: Any) -> list[Any]:
    if key not in _SPREAD:
        return [value]
    if key == "gmacs" and not isinstance(value, Mapping):
        value = {"total": value}
    found = []
    for _, part in _SPREAD[key]:
        try:
            one = value
            for name in part if isinstance(part, tuple) else (part,):
                one = one[name]
            found.append(one)
        except (TypeError, KeyError, IndexError):
            found.append(None)
    return found


def _cell(value: Any) -> Any:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.10g}"
    if isinstance(value, (dict, list)):
        return json.dumps(value, ensure_ascii=False)
    # A spreadsheet would run text that begins like this as a formula.
    if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r"):
        return "'" + value
    return value
