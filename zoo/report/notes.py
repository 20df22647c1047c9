"""The small print of a report: conventions, warnings, environment."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from zoo.report.readings import hardware
from zoo.report.words import bracketed, number

if TYPE_CHECKING:
    from zoo.report.entry import Entry

CONVENTION = (
    "GMACs are 1e9 multiply-accumulates for one image: convolutions, linear layers, attention "
    "products and the reducer's own products (matching, scoring); patch embedding and head are "
    "included, norms, softmax and other elementwise work are not."
)


def _distinct(values: Iterable[Any]) -> list[Any]:
    return sorted({value for value in values if value is not None}, key=lambda v: (str(type(v)), v))


def _listed(values: Sequence[Any]) -> str:
    words = [str(value) for value in values]
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]


def notes_on(entries: Sequence[Entry]) -> list[str]:
    """What a reader must know before comparing these entries."""
    notes = []
    measured = [entry for entry in entries if entry.top1 is not None]
    # An architecture that reduces by itself has no dense form to compare with.
    reduced = [entry for entry in measured if entry.dense or entry.row.get("reducer")]
    for backbone in dict.fromkeys(entry.backbone for entry in reduced):
        if not any(e.dense and e.top1 is not None for e in measured if e.backbone == backbone):
            notes.append(
                f"No accuracy of the dense {backbone}: run it with reducer=none to get differences."
            )
    notes += _on_references(reduced)
    images = _distinct(number(entry.row.get("n_images")) for entry in measured)
    if any(entry.partial for entry in entries) and images:
        counts = _listed([f"{count:,.0f}" for count in images])
        notes.append(f"Measured on {counts} images only; other runs saw more of the same data.")
    widest = max((e.interval for e in measured if e.interval), key=_width, default=None)
    if len(images) == 1 and widest:
        notes.append(
            f"Accuracy on {images[0]:,.0f} images carries a 95 % interval, here of up to "
            f"{_width(widest):.1f} points: {bracketed(widest)}; smaller differences may be chance."
        )
    if any(len(entry.runs) > 1 for entry in entries):
        notes.append(
            "Top-1 of several runs is their mean ± standard deviation; they differ in the seed "
            "alone, of the training or of random draws."
        )
    for name in dict.fromkeys(name for entry in entries for name in entry.speeds):
        rows = [entry.speeds[name].row for entry in entries if name in entry.speeds]
        values = _distinct(number(row.get("threads")) for row in rows)
        if len(values) > 1:
            found = _listed([f"{value:.0f}" for value in values])
            notes.append(
                f"Throughputs on {name} were measured with several thread counts ({found})."
            )
    dirty = sum(bool(entry.row.get("dirty")) for entry in entries)
    if dirty:
        rows_word = "row comes" if dirty == 1 else "rows come"
        notes.append(f"{dirty} {rows_word} from a checkout with uncommitted changes.")
    return notes


def _on_references(reduced: Sequence[Entry]) -> list[str]:
    """Who has no dense model of its own weights, and who has one of another kind."""
    dense = {e.backbone for e in reduced if e.dense and e.top1 is not None}
    alone = [e for e in reduced if not e.dense and e.reference_id is None and e.backbone in dense]
    notes = []
    if alone:
        labels = _some([e.label for e in alone])
        notes.append(
            f"No accuracy of the dense model with the weights of {labels}: run them with "
            "reducer=none to get differences."
        )
    others: dict[str, list[str]] = defaultdict(list)
    for entry in reduced:
        if entry.reference_differs:
            others[", ".join(entry.reference_differs)].append(entry.label)
    for words, whose in others.items():
        notes.append(f"{_some(whose)}: compared with the dense model {words}, for want of its own.")
    return notes


def _some(labels: Sequence[str], most: int = 4) -> str:
    shown = list(labels[:most])
    return ", ".join(shown) + (f" and {len(labels) - most} more" if len(labels) > most else "")


def _width(ends: tuple[float, float]) -> float:
    return ends[1] - ends[0]


def environment(rows: Iterable[Mapping[str, Any]]) -> str:
    """One line: versions, hardware and commits behind the rows."""
    facts: dict[str, dict[str, None]] = defaultdict(dict)  # dicts keep the order of first sight
    for row in rows:
        versions = row.get("versions")
        for package, version in (versions if isinstance(versions, Mapping) else {}).items():
            if version:
                facts[f"{package} {{}}"][str(version)] = None
        if row.get("device"):
            facts["{}"][hardware(row)] = None
        machine = row.get("machine")
        if isinstance(machine, Mapping) and machine.get("name"):
            amx = any(str(flag).startswith("amx") for flag in machine.get("isa") or ())
            facts["{}"][f"{machine['name']} ({'with' if amx else 'without'} AMX)"] = None
        for key, pattern in (("threads", "{} threads"), ("seed", "seed {}")):
            if row.get(key) is not None:
                facts[pattern][str(row[key])] = None
        if row.get("git"):
            facts["commit {}"][str(row["git"])[:9] + ("+" if row.get("dirty") else "")] = None

    def listed(values: Iterable[str]) -> str:
        shown = list(values)
        return " / ".join(shown if len(shown) <= 3 else [*shown[:3], "…"])

    return " · ".join(pattern.replace("{}", listed(values)) for pattern, values in facts.items())
