"""Tables of the leaderboards of towers without a classifier, from their rows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.markdown import markdown
from benchmarks.standings import Row, budget, good, is_dense, linked, number, share

TOLD = 5.0  # percent of pictures found again below which that tells no method from another


def agreement_table(rows: Sequence[Row], dataset: str = "fashion_mnist") -> str:
    """Markdown: agreement with the dense tower, with and without sizes in the attention.

    Args:
        rows: Of the leaderboard on DINOv2, as they were appended.
        dataset: Of which images.
    """
    rows = [row for row in of_features(rows, dataset) if not is_dense(row)]
    found: dict[tuple[str, str], dict[float, Row]] = defaultdict(dict)
    budgets = sorted({b for row in rows if (b := budget(row))}, reverse=True)
    for row in rows:
        if fraction := budget(row):
            found[_who(row), _sizes(row)][fraction] = row
    last = budgets[-1] if budgets else 0.0
    heads = [f"{100 * b:g} %" for b in budgets]
    rest = ["95 %", "centred cosine", "worst image"]
    told = max((_recall(row) or 0.0 for row in rows), default=0.0) >= TOLD
    crops = [f"other crop found first at {100 * b:g} %" for b in budgets if told]
    rest = [f"{name} at {100 * last:g} %" for name in rest]
    heads = ["method", "sizes", *heads, *rest, *crops]
    lines = [heads]

    def best(key: tuple[str, str]) -> float:
        row = found[key].get(last)
        return -row["knn"]["agreement"] if row else 0.0

    for key in sorted(found, key=lambda k: (best(k), k)):
        at = found[key].get(last)
        cells = [*key, *(_agreement(found[key].get(b), b) for b in budgets)]
        cells += [_agreed(at) if at else "", *_cosines(at)]
        cells += [number(_recall(found[key].get(b)), ".1f") for b in budgets if told]
        lines.append(cells)
    return markdown(lines)


def _recall(row: Row | None) -> float | None:
    """How often the same picture under another crop comes first, in percent."""
    found = ((row or {}).get("retrieval") or {}).get("crop") or {}
    return found.get("recall1")


def of_features(rows: Sequence[Row], dataset: str, gallery: str = "dense") -> list[Row]:
    """Good rows that looked these images up in this gallery.

    What rows of crops alone have found is told of the row of the same model that has neighbours.
    """
    rows = [r for r in good(rows) if (r["dataset"], r["gallery"]) == (dataset, gallery)]
    crops = {_model(row): row["retrieval"] for row in rows if not row["knn"]}
    return [
        {**row, "retrieval": row["retrieval"] or crops.get(_model(row))}
        for row in rows
        if row["knn"]
    ]


def _model(row: Row) -> tuple[Any, ...]:
    return row["backbone"], row["img_size"], _who(row), _sizes(row), budget(row), row["seed"]


def resolution_table(rows: Sequence[Row], dataset: str = "fashion_mnist") -> str:
    """Markdown: the dense tower fed smaller images, against itself.

    Args:
        rows: Of the leaderboard on DINOv2, as they were appended.
        dataset: Of which images.
    """
    rows = [row for row in of_features(rows, dataset) if is_dense(row)]
    told = max((_recall(row) or 0.0 for row in rows), default=0.0) >= TOLD
    heads = ["pixels", "GMACs", "of the dense cost", "answers as dense", "95 %"]
    heads += ["centred cosine", "worst image", *["other crop found first"] * told]
    lines = [heads]
    full = max((row["gmacs"]["total"] for row in rows), default=1.0)
    for row in sorted(rows, key=lambda r: -r["img_size"]):
        total = row["gmacs"]["total"]
        cells = [str(row["img_size"]), f"{total:.2f}", f"{100 * total / full:.0f} %"]
        cells += [f"{row['knn']['agreement']:.1f}", _agreed(row), *_cosines(row)]
        cells += [number(_recall(row), ".1f")] * told
        lines.append(cells)
    return markdown(lines)


def gallery_table(rows: Sequence[Row], dataset: str = "fashion_mnist") -> str:
    """Markdown: right labels by the dense tower's gallery and by the reduced tower's own.

    Args:
        rows: Of the leaderboard on DINOv2 and of its galleries, as they were appended.
        dataset: Of which images.
    """
    found: dict[tuple[str, str, float], dict[str, Row]] = defaultdict(dict)
    for gallery in ("dense", "own"):
        for row in of_features(rows, dataset, gallery):
            if row["img_size"] == 224:
                found[_who(row), _sizes(row), budget(row) or 1.0][gallery] = row
    heads = ["method", "sizes", "budget", "dense gallery", "95 %", "own gallery", "95 %"]
    lines = [heads]
    both = [(key, pair) for key, pair in found.items() if len(pair) == 2]
    for key, pair in sorted(both, key=lambda item: -item[1]["own"]["knn"]["top1"]):
        name, sizes, fraction = key
        dense = fraction == 1.0
        cells = ["dense" if dense else name, "" if dense else sizes, f"{100 * fraction:g} %"]
        for gallery in ("dense", "own"):
            knn = pair[gallery]["knn"]
            cells += [f"{knn['top1']:.1f}", "{:.1f} to {:.1f}".format(*knn["ci95"])]
        lines.append(cells)
    return markdown(lines)


def selector_table(rows: Sequence[Row]) -> str:
    """Markdown: what selectors leave, against random tokens and lower resolution.

    Args:
        rows: Of the leaderboard of selectors, as they were appended.
    """
    rows = good(rows)
    keeps = [found["keep"] for found in rows[0]["select"]["by_keep"]] if rows else []
    parts = ("answers as dense", "centred cosine", "coverage error x 1000")
    heads = ["selector", *(f"{part}, {k} tokens" for k in keeps for part in parts)]
    lines = [heads]
    table: dict[str, list[str]] = {}
    for row in sorted(rows, key=lambda r: -r["select"]["by_keep"][-1]["selector"]["agreement"]):
        by_keep = row["select"]["by_keep"]
        name = row["select"]["selector"]["name"]
        page = name.removesuffix("_plus")  # a paper's variants share its page
        table[f"[`{name}`](selectors/{page}.md)"] = [
            cell for found in by_keep for cell in _selected(found["selector"])
        ]
        for control in ("random", "resolution"):  # the same for every selector
            cells = [cell for found in by_keep for cell in _selected(found[control])]
            table.setdefault(f"*{control}*", cells)
    controls = [f"*{name}*" for name in ("random", "resolution")]
    for name in [*(n for n in table if n not in controls), *(n for n in controls if n in table)]:
        lines.append([name, *table[name]])
    return markdown(lines)


def _selected(found: Mapping[str, Any] | None) -> list[str]:
    if found is None:
        return ["", "", ""]
    covered = found.get("coverage_mean")
    thousandths = None if covered is None else 1000 * covered
    numbers = (found["agreement"], ".1f"), (found["centred_cosine"], ".3f"), (thousandths, ".2f")
    return [number(value, form) for value, form in numbers]


def _agreed(row: Row) -> str:
    return "{:.1f} to {:.1f}".format(*row["knn"]["agreement_ci95"])


def _cosines(row: Row | None) -> list[str]:
    cosine = (row or {}).get("centred_cosine") or {}
    return [number(cosine.get(name), ".3f") for name in ("mean", "worst")]


def _who(row: Row) -> str:
    reducer = dict(row["reducer"] or {})
    settle = reducer.get("settle")
    name = linked(row["method"])
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
