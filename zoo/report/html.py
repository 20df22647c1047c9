"""The interactive page: one self-contained HTML file that loads nothing from anywhere.

The looks are in ``page.html`` and ``page.css``, the behaviour in ``page.js``; this module fills in
the table and hands the rest over as JSON. Everything that stems from a row is escaped here, or
set as text (never as markup) by the script.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from datetime import datetime, timezone
from html import escape
from importlib import resources
from typing import Any

from zoo.report.colors import method_colors
from zoo.report.compare import Comparison, Entry, View, succeeded_later
from zoo.report.notes import CONVENTION, environment
from zoo.report.tables import entry_cells, signed
from zoo.report.words import (
    DENSE,
    describe_budget,
    describe_tokens,
    format_gmacs,
    format_range,
    format_rate,
    number,
)
from zoo.rows import FIELDS, Row

# (title, what it sorts by: a number of the entry, or None for words, class)
_COLUMNS: tuple[tuple[str, Any, str], ...] = (
    ("Method", None, "word"),
    ("Backbone", None, "word where"),
    ("Data", None, "word where"),
    ("Budget", None, "word"),
    ("Tokens", lambda e: number(e.tokens[-1][-1]) if describe_tokens(e.tokens) else None, ""),
    ("GMACs", lambda e: e.gmacs, ""),
    ("−GMACs", lambda e: e.saved, ""),
    ("Top-1 %", lambda e: e.top1, ""),
    ("95 % interval", lambda e: e.interval and e.interval[0], ""),
    ("Δ top-1", lambda e: e.delta, ""),
    ("img/s", None, "rate"),
    ("Speed-up", None, "up"),
    ("Weights", None, "word"),
)


def html_page(comparison: Comparison, title: str) -> str:
    """The whole page as a string, plotly's script included."""
    from plotly.offline import get_plotlyjs

    views = comparison.views
    colors = method_colors(entry.name for entry in comparison.entries if not entry.dense)
    ids = {id(row): index for index, row in enumerate(comparison.rows)}
    options = "".join(
        f'<option value="{index}">{escape(view.label)}</option>' for index, view in enumerate(views)
    )
    records = [
        _record(entry, entry.row, ids[id(entry.row)], colors, old=False)
        for view in views
        if not view.combined
        for entry in view.entries
    ]
    records += [
        _record(entry, row, ids[id(row)], colors, old=True) for row, entry in comparison.others
    ]
    now = datetime.now(timezone.utc)
    count = len(records)
    return _fill(
        _asset("page.html"),
        title=escape(title),
        css=_asset("page.css"),
        js=_asset("page.js"),
        plotly=get_plotlyjs(),
        lede=escape(_lede(comparison)),
        view_options=options,
        row_count=f"{count} row{'s' * (count != 1)}",
        table_class="single" if len(views) == 1 else "",
        table_head=_table_head(),
        table_body="\n".join(records),
        failed=_failed(comparison),
        convention=escape(CONVENTION),
        environment=escape(environment(comparison.rows)),
        generated=f"Generated {now:%Y-%m-%d %H:%M} UTC by TokenZoo; this file loads nothing.",
        payload=_payload(comparison, colors, ids),
    )


def _asset(name: str) -> str:
    return resources.files("zoo.report").joinpath(name).read_text(encoding="utf-8")


def _fill(template: str, **values: str) -> str:
    # One pass, so that a value which looks like a placeholder stays as it is.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], template)


def _lede(comparison: Comparison) -> str:
    methods = {e.row.get("method") for e in comparison.entries if not e.dense}
    backbones = {e.backbone for e in comparison.entries}
    data = {e.data for e in comparison.entries if e.data}
    parts = [_count(len(methods), "token-reduction method")]
    parts.append(f"on {_count(len(backbones), 'backbone')}")
    if data:
        parts.append(f"and {_count(len(data), 'data set')}")
    text = " ".join(parts) + ": what each one saves, and what it costs in accuracy."
    if comparison.failed:
        text += f" {_count(len(comparison.failed), 'run')} failed, listed at the end."
    return text


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


# ------------------------------------------------------------------------------------ table


def _table_head() -> str:
    return "".join(
        f'<th scope="col" class="{kind}"><button type="button">{name}</button></th>'
        for name, _, kind in _COLUMNS
    )


def _record(
    entry: Entry, row: Row, row_id: int, colors: dict[str, tuple[str, str]], *, old: bool
) -> str:
    setting = next(iter(entry.speeds), None)
    cells = _old_cells(row) if old else entry_cells(entry, setting)
    cells[1:1] = [entry.backbone, entry.data]
    light, dark = colors[DENSE if entry.dense else entry.name]
    shape = "dense" if entry.dense else "trained" if entry.trained else ""
    dot = f'<i class="{shape}" style="--light:{light};--dark:{dark}"></i>'
    label = escape(cells[0]) + (" (earlier or partial run)" if old else "")
    first = (
        f'<td class="word"><button type="button" aria-expanded="false">{dot}'
        f"<span>{label}</span></button></td>"
    )
    found = [first]
    for (name, sort_by, kind), text in zip(_COLUMNS[1:], cells[1:], strict=True):
        value = sort_by(entry) if sort_by and not old else None
        if old:
            value = _old_value(name, row)
        elif name in ("img/s", "Speed-up") and setting:
            speed = entry.speeds[setting]
            value = speed.rate if name == "img/s" else (None if entry.dense else speed.speedup)
        key = "" if value is None else f' data-v="{value:.10g}"'
        found.append(f'<td class="{kind}"{key}>{escape(text)}</td>')
    kind = ' class="old" hidden' if old else ""
    return f'<tr data-row="{row_id}" data-entry="{entry.id}"{kind}>{"".join(found)}</tr>'


def _old_value(name: str, row: Row) -> float | None:
    gmacs = row.get("gmacs")
    values = {
        "GMACs": gmacs.get("total") if isinstance(gmacs, dict) else gmacs,
        "Top-1 %": row.get("top1"),
        "img/s": row.get("imgs_per_s"),
    }
    return number(values.get(name))


def _old_cells(row: Row) -> list[str]:
    method = row.get("method") or DENSE
    gmacs, top1, rate = (_old_value(name, row) for name in ("GMACs", "Top-1 %", "img/s"))
    return [
        "dense" if method == DENSE else str(method),
        describe_budget(row.get("schedule")),
        describe_tokens(row.get("tokens")).replace("->", "→"),
        "" if gmacs is None else format_gmacs(gmacs) + format_range(row),
        "",
        "" if top1 is None else f"{top1:.2f}",
        "",
        "",
        "" if rate is None else format_rate(rate),
        "",
        "trained" if row.get("trained") else "",
    ]


def _failed(comparison: Comparison) -> str:
    if not comparison.failed:
        return ""
    items = []
    for row in comparison.failed:
        method = str(row.get("method") or DENSE)
        what = f"{row.get('backbone') or '?'} + {method} {describe_budget(row.get('schedule'))}"
        later = succeeded_later(row, comparison.rows)
        meta = [_time(row.get("created")), "a later run succeeded" if later else ""]
        command = f"<p><code>{escape(str(row['command']))}</code></p>" if row.get("command") else ""
        items.append(
            f"<li><p><strong>{escape(what.rstrip())}</strong> "
            f'<span class="meta">{escape(" · ".join(part for part in meta if part))}</span></p>'
            f"<p>{escape(str(row.get('error') or 'no reason recorded'))}</p>{command}</li>"
        )
    return (
        f'<section class="card failed"><h2>{_count(len(items), "failed run")}</h2>'
        f"<ol>{''.join(items)}</ol></section>"
    )


def _time(created: Any) -> str:
    return str(created or "")[:16].replace("T", " ")


# ---------------------------------------------------------------------------------- payload


def _payload(
    comparison: Comparison, colors: dict[str, tuple[str, str]], ids: dict[int, int]
) -> str:
    payload = {
        "dense": DENSE,
        "colors": colors,
        "entries": {entry.id: _entry(entry) for entry in comparison.entries},
        "views": [_view(view) for view in comparison.views],
        "rows": {ids[id(row)]: _details(row) for row in comparison.rows},
    }
    text = json.dumps(payload, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    # Inside a script element only "<" can end it; as an escape it is the same JSON.
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _entry(entry: Entry) -> dict[str, Any]:
    low, high = entry.interval or (None, None)
    return {
        "id": entry.id,
        "method": DENSE if entry.dense else entry.name,
        "short": _clip(entry.title, 24),
        "backbone": entry.backbone,
        "dense": entry.dense,
        "trained": entry.trained,
        "gmacs": entry.gmacs,
        "top1": entry.top1,
        "low": low,
        "high": high,
        "speeds": {
            name: {
                "rate": speed.rate,
                "text": format_rate(speed.rate),
                "up": None if entry.dense else speed.speedup,
                "uptext": f"×{speed.speedup:.2f}" if speed.speedup and not entry.dense else "",
            }
            for name, speed in entry.speeds.items()
        },
        "hover": _hover(entry),
    }


def _clip(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _hover(entry: Entry) -> list[str]:
    """The row in short lines, the first one its heading."""
    row = entry.row
    lines = [_clip(entry.label, 44), entry.backbone]
    if entry.top1 is not None:
        delta = f" (Δ {signed(entry.delta)})" if entry.delta is not None else ""
        ends = " [{:.1f}, {:.1f}]".format(*entry.interval) if entry.interval else ""
        lines.append(f"top-1 {entry.top1:.2f} %{ends}{delta}")
    if entry.gmacs is not None:
        saved = f" (saves {entry.saved:.1f} %)" if entry.saved is not None else ""
        mean = f"{format_gmacs(entry.gmacs)}{format_range(entry.cost)}"
        lines.append(f"{mean} GMACs{saved}")
    for name, speed in entry.speeds.items():
        times = f" (×{speed.speedup:.2f})" if speed.speedup and not entry.dense else ""
        lines.append(f"{format_rate(speed.rate)} img/s{times} on {_clip(name, 24)}")
    if tokens := describe_tokens(entry.tokens):
        lines.append(f"tokens {tokens.replace('->', '→')}")
    facts = ["trained" if entry.trained else "off the shelf"]
    for key, text in (("n_images", "{:,.0f} images"), ("seed", "seed {:.0f}")):
        if (value := number(row.get(key))) is not None:
            facts.append(text.format(value))
    lines.append(", ".join(facts))
    commit = f"commit {str(row['git'])[:9]}{'+' * bool(row.get('dirty'))}" if row.get("git") else ""
    lines.append(" · ".join(part for part in (_time(row.get("created")), commit) if part))
    return [line for line in lines if line]


def _details(row: Row) -> list[tuple[str, str, str]]:
    """(field, value, meaning) of everything that a row knows."""
    found = []
    for key, value in row.items():
        if value is None or value == "":
            continue
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        found.append((key, text, FIELDS.get(key, "")))
    return found


def _view(view: View) -> dict[str, Any]:
    def numbers(entries: Sequence[Entry]) -> list[int]:
        return [entry.id for entry in entries]

    return {
        "combined": view.combined,
        "entries": numbers(view.entries),
        "reference": view.reference.id if view.reference else None,
        "front": numbers(view.front),
        "speed": {name: numbers(front) for name, front in view.speed_fronts.items()},
        "notes": view.notes,
        "tiles": {name: tiles(view, name) for name in view.settings or [""]},
        "empty": _empty(view),
    }


def _empty(view: View) -> dict[str, str | None]:
    """What to say in place of a plot without points."""
    measured = [entry for entry in view.entries if entry.top1 is not None]
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
        points: How much top-1 a reduced model may lose to count as still good.
    """
    found = []
    methods = {entry.row.get("method") for entry in view.entries if not entry.dense}
    base = view.reference
    if base:
        parts = [f"{format_gmacs(base.gmacs)} GMACs" if base.gmacs is not None else ""]
        if setting in base.speeds:
            parts.append(f"{format_rate(base.speeds[setting].rate)} img/s")
        if base.top1 is not None:
            text = " · ".join(part for part in parts if part)
            found.append(("Dense model, top-1", f"{base.top1:.2f} %", text))
        else:
            found.append(("Dense model", parts[0] or "no GMACs", " · ".join(parts[1:])))
    good = [e for e in view.entries if e.delta is not None and e.delta >= -points]

    def about(entry: Entry) -> str:
        where = f" on {entry.backbone}" if view.combined else ""
        return f"{entry.label}{where}, top-1 {entry.top1:.2f} %"

    within = f"within {points:g} point of dense"
    cheap = max((e for e in good if e.saved), key=_saved, default=None)
    if cheap:
        found.append((f"Fewest GMACs {within}", f"−{_saved(cheap):.0f} %", about(cheap)))
    elif any(e.delta is not None for e in view.entries):
        found.append((f"Fewest GMACs {within}", "none", "every reduced model loses more"))
    elif least := max((e for e in view.entries if e.saved), key=_saved, default=None):
        found.append(("Fewest GMACs", f"−{_saved(least):.0f} %", least.label))
    fast = [(e.speeds[setting].speedup or 0, e) for e in good if setting in e.speeds]
    speedup, entry = max(fast, key=lambda pair: pair[0], default=(0, None))
    if entry and speedup:
        found.append((f"Fastest {within}", f"×{speedup:.2f}", about(entry)))
    reduced = sum(not entry.dense for entry in view.entries)
    text = f"{_count(reduced, 'reduced model')}, {len(view.entries) - reduced} dense"
    found.append(("Compared here", _count(len(methods), "method"), text))
    # A line must not end between a number and its percent sign.
    return [(name, value, text.replace(" %", "\u00a0%")) for name, value, text in found]
