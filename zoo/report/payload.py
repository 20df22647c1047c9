"""What the page's script works with: every entry, view and row as JSON."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zoo.report.colors import Mark
from zoo.report.controls import KINDS
from zoo.report.entry import Comparison, Entry, View
from zoo.report.identity import options, precision
from zoo.report.links import title_of
from zoo.report.published import TRAININGS, Published, points
from zoo.report.quality import METRICS, TOP1, shown
from zoo.report.readings import Row, Speed
from zoo.report.spreadsheet import csv_table
from zoo.report.tables import (
    fidelity_cells,
    format_memory,
    format_score,
    format_share,
    format_times,
    signed,
)
from zoo.report.words import (
    DENSE,
    bracketed,
    cost_range,
    describe_size,
    describe_tokens,
    format_gmacs,
    format_range,
    format_rate,
    number,
)
from zoo.results.rows import FIELDS


def method_of(entry: Entry) -> str:
    """What the filter calls it: the method with its arguments, the dense model, or a control."""
    return DENSE if entry.is_reference else entry.name


def time_of(created: Any) -> str:
    """Date and minute."""
    return str(created or "")[:16].replace("T", " ")


def counted(number: int, noun: str) -> str:
    """A number with its noun.

    >>> counted(1, "row"), counted(2, "row")
    ('1 row', '2 rows')
    """
    return f"{number} {noun}{'s' * (number != 1)}"


def payload(
    comparison: Comparison,
    marks: dict[str, Mark],
    ids: dict[int, int],
    published: Sequence[Published] = (),
) -> str:
    """Returns the JSON text, safe inside a script element.

    Args:
        comparison: What the page shows.
        marks: Of every method: colours and shape.
        ids: Numbers of the rows, by identity.
        published: Numbers of others on ImageNet.
    """
    found = {
        "dense": DENSE,
        "colors": {name: mark.colors for name, mark in marks.items()},
        "shapes": {name: mark.shape for name, mark in marks.items()},
        "csv": csv_table(comparison),
        "metrics": [
            {
                "key": metric.key,
                "name": metric.words,
                "title": metric.words + (" (%)" if metric.unit else ""),
                "head": metric.words[:1].upper() + metric.words[1:],
                "same": metric.same,
                "percent": bool(metric.unit),
            }
            for metric in METRICS
        ],
        "controls": list(KINDS),
        "entries": {e.id: _entry(e) for view in comparison.views for e in view.entries},
        "views": [_view(view, ids) for view in comparison.views],
        "rows": {ids[id(row)]: _details(row) for row in comparison.rows},
        "published": points(published),
        "trainings": TRAININGS,
        "imagenet": [e.id for e in comparison.entries if _on_imagenet(e)],
    }
    text = json.dumps(found, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    # Inside a script element only "<" can end it; as an escape it is the same JSON.
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _on_imagenet(entry: Entry) -> bool:
    """Whether it may stand beside published numbers."""
    measured = entry.top1 is not None and entry.gmacs is not None
    return measured and "imagenet" in str(entry.row.get("dataset")).lower()


def _entry(entry: Entry) -> dict[str, Any]:
    scores = {metric.key: entry.score(metric) for metric in (TOP1, *METRICS)}
    ends = {metric.key: entry.interval_of(metric) for metric in (TOP1, *METRICS)}
    scores |= {name: entry.fidelity.get(name) for name in ("agreement", "cosine")}
    return {
        "id": entry.id,
        "runs": ", ".join(runs_in_words(entry)) if len(entry.runs) > 1 else None,
        "search": _search(entry),
        "method": method_of(entry),
        "name": entry.label,
        "short": _clip(f"{entry.name} {entry.budget}" if entry.control else entry.title, 24),
        "control": entry.control,
        "guest": entry.guest,
        "backbone": entry.backbone,
        "dense": entry.dense,
        "trained": entry.trained,
        "gmacs": entry.gmacs,
        "scores": {name: value for name, value in scores.items() if value is not None},
        "ends": {name: value for name, value in ends.items() if value is not None},
        "range": cost_range(entry.cost),
        "speeds": {
            name: {
                "rate": speed.rate,
                "text": format_rate(speed.rate),
                "up": None if entry.is_reference else speed.speedup,
                "uptext": _times(entry, speed),
                "efficiency": None if entry.is_reference else speed.efficiency,
                "efftext": "" if entry.is_reference else format_share(speed.efficiency),
                "timm": None
                if entry.is_reference or speed.timm is None
                else {
                    "up": speed.over_timm,
                    "uptext": format_times(speed.over_timm),
                    "efficiency": speed.efficiency_over_timm,
                    "efftext": format_share(speed.efficiency_over_timm),
                },
                "memory": speed.memory,
                "memtext": format_memory(speed.memory),
            }
            for name, speed in entry.speeds.items()
        },
        "hover": _hover(entry),
        **({} if entry.picture is None else {"picture": picture_of(entry.picture)}),
    }


#: A report with a picture for every point must stay quick to open.
_MOST_BYTES = 120_000


def picture_of(row: Row) -> dict[str, str] | None:
    """The picture that a run drew and where its page is, while the file is there.

    Args:
        row: With the field `picture`.
    """
    path, visual = Path(str(row.get("picture"))), row.get("visual")
    try:
        if path.suffix != ".png" or not 0 < path.stat().st_size <= _MOST_BYTES:
            return None
        data = path.read_bytes()
    except (OSError, ValueError):
        return None
    if not data.startswith(b"\x89PNG"):
        return None
    page = str(visual.get("page") or "") if isinstance(visual, Mapping) else ""
    return {"src": "data:image/png;base64," + base64.b64encode(data).decode(), "page": page}


def _search(entry: Entry) -> str:
    """What a search looks into: all names, numbers of the budget, and the title of the paper."""
    row = entry.row
    words = [entry.label, entry.backbone, entry.data or "costs only", entry.control or ""]
    words += [describe_size(row), *options(row), precision(row), str(row.get("weights") or "")]
    words += ["trained" if entry.trained else "off the shelf", *title_of(row)]
    return " ".join(words).lower()


def _times(entry: Entry, speed: Speed) -> str:
    return "" if entry.is_reference else format_times(speed.speedup)


def _clip(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _hover(entry: Entry) -> list[str]:
    """The row in short lines, the first one its heading."""
    row = entry.row
    lines = [_clip(entry.label, 44), entry.backbone]
    if entry.top1 is not None:
        delta = f" (Δ {signed(entry.delta)})" if entry.delta is not None else ""
        ends = f" {bracketed(entry.interval)}" if entry.interval else ""
        lines.append(f"top-1 {format_score(entry)} %{ends}{delta}")
    if len(entry.runs) > 1:
        lines.append(_clip(", ".join(runs_in_words(entry)), 90))
    for metric in METRICS:
        if (one := entry.quality.get(metric.key)) is not None:
            lost = entry.lost(metric)
            delta = f" (Δ {signed(lost)})" if lost is not None and metric.unit else ""
            between = entry.interval_of(metric)
            both = f" {bracketed(between)}" if between else ""
            lines.append(f"{metric.words} {shown(metric, one)}{metric.unit}{both}{delta}")
    if entry.gmacs is not None:
        saved = f" (saves {entry.saved:.1f} %)" if entry.saved is not None else ""
        mean = f"{format_gmacs(entry.gmacs)}{format_range(entry.cost)}"
        share = entry.reducer_share
        own = f", reducer {share:.1f} %" if share is not None else ""
        lines.append(f"{mean} GMACs{saved}{own}")
    for name, speed in entry.speeds.items():
        part = speed.efficiency
        promised = f", efficiency {format_share(part)}" if part is not None else ""
        times = f" ({text}{promised})" if (text := _times(entry, speed)) else ""
        memory = f", {format_memory(speed.memory)}" if speed.memory is not None else ""
        lines.append(f"{format_rate(speed.rate)} img/s{times}{memory} on {_clip(name, 34)}")
    if entry.fidelity:
        agreement, divergence, cosine = fidelity_cells(entry.fidelity)
        lines.append(f"as dense: {agreement} of answers, KL {divergence}, cosine {cosine or '?'}")
    if tokens := describe_tokens(entry.tokens):
        lines.append(f"tokens {tokens.replace('->', '→')}")
    facts = ["trained" if entry.trained else "off the shelf"]
    if entry.control:
        facts[0] = f"control: {entry.control}"
    if (count := number(row.get("n_images"))) is not None:
        facts.append(f"{count:,.0f} images")
    if len(entry.runs) > 1:
        facts.append(f"{len(entry.runs)} runs")
    elif (seed := number(row.get("seed"))) is not None:
        facts.append(f"seed {seed:.0f}")
    lines.append(", ".join(facts))
    commit = f"commit {str(row['git'])[:9]}{'+' * bool(row.get('dirty'))}" if row.get("git") else ""
    lines.append(" · ".join(part for part in (time_of(row.get("created")), commit) if part))
    return [line for line in lines if line]


def runs_in_words(entry: Entry) -> list[str]:
    """Every run of an entry by its seeds, with its top-1."""
    return [f"{name}: {score:.2f} %" for name, score in zip(entry.runs, entry.scores, strict=True)]


def _details(row: Row) -> list[tuple[str, str, str]]:
    """(field, value, meaning) of everything that a row knows."""
    found = []
    for key, value in row.items():
        if value is None or value == "":
            continue
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        found.append((key, text, FIELDS.get(key, "")))
    return found


def _view(view: View, ids: Mapping[int, int]) -> dict[str, Any]:
    def numbers(entries: Sequence[Entry]) -> list[int]:
        return [entry.id for entry in entries]

    return {
        "combined": view.combined,
        "entries": numbers(view.entries),
        "reference": view.reference.id if view.reference else None,
        "front": numbers(view.front),
        "front_untrained": numbers(view.front_untrained),
        "failures": [ids[id(row)] for row in view.failures],
        "metric": view.metric.key,
        "speed": {name: numbers(front) for name, front in view.speed_fronts.items()},
        "notes": view.notes,
        "tiles": {name: tiles(view, name) for name in view.settings or [""]},
        "empty": _empty(view),
    }


def _empty(view: View) -> dict[str, str | None]:
    """What to say in place of a plot without points."""
    measured = [entry for entry in view.entries if entry.measured or entry.fidelity]
    costs = any(entry.gmacs is not None for entry in measured)
    speeds = any(entry.speeds for entry in measured)
    if not measured:
        have = "costs" if any(e.gmacs is not None for e in view.entries) else "no accuracy"
        reason = f"These runs measured {have} only: add accuracy to task=[…] to see a plot here."
        reason = reason.replace("measured no accuracy only", "measured no accuracy")
        return {"gmacs": reason, "speed": reason}
    return {
        "gmacs": None if costs else "No GMACs were counted: add flops to task=[…].",
        "speed": None if speeds else "No throughput was measured: add throughput to task=[…].",
    }


def _saved(entry: Entry) -> float:
    return entry.saved or 0.0


def tiles(view: View, setting: str, points: float = 1.0) -> list[tuple[str, str, str]]:
    """(name, value, explanation) of the findings that stand at the top of the page.

    Args:
        view: The view.
        setting: Hardware setting that speeds are taken from; empty if there is none.
        points: How much a reduced model may lose to count as still good.
    """
    found = []
    metric = view.metric
    name = "top-1" if metric is TOP1 else metric.words
    reduced = [entry for entry in view.entries if not entry.dense]
    base = view.reference
    if base:
        parts = [f"{format_gmacs(base.gmacs)} GMACs" if base.gmacs is not None else ""]
        if setting in base.speeds:
            parts.append(f"{format_rate(base.speeds[setting].rate)} img/s")
        if (score := base.score(metric)) is not None:
            text = " · ".join(part for part in parts if part)
            found.append((f"Dense model, {name}", f"{score:.2f}{metric.unit}", text))
        else:
            found.append(("Dense model", parts[0] or "no GMACs", " · ".join(parts[1:])))
    points = points if metric.unit else points / 100
    lost = {id(e): e.lost(metric) for e in reduced}
    good = [e for e in reduced if (own := lost[id(e)]) is not None and own >= -points]

    def about(entry: Entry) -> str:
        where = f" on {entry.backbone}" if view.combined else ""
        return f"{entry.label}{where}, {name} {entry.score(metric):.2f}{metric.unit}"

    within = f"within {points:g} point of dense"
    cheap = max((e for e in good if e.saved), key=_saved, default=None)
    if cheap:
        found.append((f"Fewest GMACs {within}", f"−{_saved(cheap):.0f} %", about(cheap)))
    elif any(own is not None for own in lost.values()):
        found.append((f"Fewest GMACs {within}", "none", "every reduced model loses more"))
    elif least := max(
        (e for e in view.entries if e.saved and not e.dense), key=_saved, default=None
    ):
        found.append(("Fewest GMACs", f"−{_saved(least):.0f} %", least.label))
    fast = [(e.speeds[setting].speedup or 0, e) for e in good if setting in e.speeds]
    speedup, entry = max(fast, key=lambda pair: pair[0], default=(0, None))
    if entry and speedup:
        found.append((f"Fastest {within}", f"×{speedup:.2f}", about(entry)))
    text = f"{counted(len(reduced), 'reduced model')}, {len(view.entries) - len(reduced)} dense"
    found.append(("Compared here", counted(len(view.entries), "result"), text))
    # A line must not end between a number and its percent sign.
    return [(name, value, text.replace(" %", "\u00a0%")) for name, value, text in found]
