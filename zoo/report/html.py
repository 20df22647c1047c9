"""The interactive page: one self-contained HTML file that loads nothing from anywhere.

The looks are in ``page.html`` and ``page.css``, the behaviour in ``page.js``; this module fills in
the table and hands the rest over as JSON. Everything that stems from a row is escaped here, or
set as text (never as markup) by the script.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from zoo.report.colors import Mark, method_marks
from zoo.report.entry import Comparison, Entry
from zoo.report.links import Links, links_of
from zoo.report.names import methods_of
from zoo.report.notes import CONVENTION, environment
from zoo.report.payload import counted, method_of, payload, time_of
from zoo.report.published import Published
from zoo.report.quality import METRICS, Metric, qualities, shown
from zoo.report.readings import Speed, fidelity
from zoo.report.selection import as_html, sections
from zoo.report.tables import (
    entry_cells,
    failure_cells,
    fidelity_cells,
    runs_without_result,
)
from zoo.report.words import (
    DENSE,
    describe_budget,
    describe_size,
    describe_tokens,
    format_gmacs,
    format_millions,
    format_range,
    format_rate,
    number,
)
from zoo.results.rows import Row

_MEANINGS = {
    "Input": "side of the images, in pixels",
    "Params": "parameters, in millions",
    "Runs": "with other seeds; scores are their mean ± standard deviation",
    "Reducer": "share of the GMACs that are the reducer's own",
    "−GMACs": "saved, against the dense model",
    "Δ top-1": "points against the dense model",
    "Agreement": "images on which it answers as the dense model does",
    "KL": "divergence of the answers from the dense model's, in nats; 0 is the same",
    "Cosine": "of the features before the classifier with the dense model's; 1 is the same",
    "Speed-up": "throughput against the dense model's, same engine and batch size",
    "Efficiency": "speed-up over what the GMACs promise; 100 % is all of it",
    "Memory": "peak on the device",
    **{metric.column: metric.meaning for metric in METRICS},
}


def _score(metric: Metric) -> Callable[[Entry], float | None]:
    return lambda entry: entry.score(metric)


# (title, what it sorts by: a number of the entry, or None for words, class)
_COLUMNS: tuple[tuple[str, Any, str], ...] = (
    ("Method", None, "word"),
    ("Backbone", None, "word where"),
    ("Data", None, "word where"),
    ("Budget", None, "word"),
    ("Input", lambda e: number(e.row.get("img_size")), ""),
    ("Params", lambda e: number(e.cost.get("params_m")), ""),
    ("Tokens", lambda e: number(e.tokens[-1][-1]) if describe_tokens(e.tokens) else None, ""),
    ("GMACs", lambda e: e.gmacs, ""),
    ("Reducer", lambda e: e.reducer_share, ""),
    ("−GMACs", lambda e: e.saved, ""),
    ("Top-1 %", lambda e: e.top1, ""),
    ("Runs", lambda e: e.count if e.measured else None, ""),
    ("95 % interval", lambda e: e.interval and e.interval[0], ""),
    ("Δ top-1", lambda e: e.delta, ""),
    ("img/s", None, "rate"),
    ("Speed-up", None, "up"),
    ("Efficiency", None, "efficiency"),
    ("Memory", None, "memory"),
    ("Agreement", lambda e: e.fidelity.get("agreement"), ""),
    ("KL", lambda e: e.fidelity.get("kl"), ""),
    ("Cosine", lambda e: e.fidelity.get("cosine"), ""),
    *((metric.column, _score(metric), "") for metric in METRICS),
)

_OF_SPEED: dict[str, Callable[[Speed], float | None]] = {
    "img/s": lambda s: s.rate,
    "Speed-up": lambda s: s.speedup,
    "Efficiency": lambda s: s.efficiency,
    "Memory": lambda s: s.memory,
}


def html_page(
    comparison: Comparison,
    title: str,
    folder: Path | None = None,
    published: Sequence[Published] | None = None,
) -> str:
    """The whole page as a string, plotly's script included.

    Args:
        comparison: What it shows.
        title: Its heading.
        folder: Where it will lie: links to pages of the documentation start there.
        published: Numbers of others on ImageNet.
    """
    from plotly.offline import get_plotlyjs

    views = comparison.views
    marks = method_marks(entry.name for entry in comparison.entries if not entry.dense)
    folder = folder or Path.cwd()
    failures = {id(row): row for view in views for row in view.failures}
    ids = {id(row): index for index, row in enumerate(comparison.rows)}
    options = "".join(
        f'<option value="{index}">{escape(view.label)}</option>' for index, view in enumerate(views)
    )
    records = [
        _record(entry, entry.row, ids[id(entry.row)], marks[method_of(entry)], folder)
        for view in views
        if not view.combined
        for entry in view.entries
    ]
    records += [
        _record(entry, row, ids[id(row)], marks[method_of(entry)], folder, old=_kind(row, entry))
        for row, entry in comparison.others
    ]
    now = datetime.now(timezone.utc)
    count = len(records) - sum(entry.guest for view in views for entry in view.entries)
    records += [_failure(row, ids[id(row)], folder) for row in failures.values()]
    return _fill(
        _asset("page.html"),
        title=escape(title),
        css=_asset("page.css"),
        js=_asset("page.js"),
        plotly=get_plotlyjs(),
        lede=escape(_lede(comparison)),
        alarm=_alarm(comparison),
        view_options=options,
        row_count=f"{count} row{'s' * (count != 1)}",
        table_class="single" if len(views) == 1 else "",
        table_head=_table_head(),
        table_body="\n".join(records),
        failed=as_html(sections(comparison.rows)) + _failed(comparison),
        published="" if not published else _asset("published.html"),
        convention=escape(CONVENTION),
        environment=escape(environment(comparison.rows)),
        generated=f"Generated {now:%Y-%m-%d %H:%M} UTC by TokenZoo; this file loads nothing.",
        payload=payload(comparison, marks, ids, published or ()),
    )


def _asset(name: str) -> str:
    return resources.files("zoo.report").joinpath(name).read_text(encoding="utf-8")


def _fill(template: str, **values: str) -> str:
    # One pass, so that a value which looks like a placeholder stays as it is.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], template)


def _lede(comparison: Comparison) -> str:
    backbones = {e.backbone for e in comparison.entries}
    data = {str(e.row.get("dataset")) for e in comparison.entries if e.data}
    parts = [counted(len(methods_of(comparison.entries)), "token-reduction method")]
    parts.append(f"on {counted(len(backbones), 'backbone')}")
    if data:
        parts.append(f"and {counted(len(data), 'data set')}")
    return " ".join(parts) + ": what each one saves, and what it costs in accuracy."


def _alarm(comparison: Comparison) -> str:
    if not comparison.failed:
        return ""
    return f' <a class="alarm" href="#failed">{runs_without_result(comparison.failed)}.</a>'


# ------------------------------------------------------------------------------------ table


def _table_head() -> str:
    return "".join(
        f'<th scope="col" class="{kind}"><button type="button" title="{_MEANINGS.get(name, "")}">'
        f"{name}</button></th>"
        for name, _, kind in _COLUMNS
    )


def _kind(row: Row, entry: Entry) -> str:
    """What a row is that stands for nothing by itself."""
    name = next((name for name, run in entry.runs.items() if run is row), None)
    return "earlier or partial run" if name is None else f"one of {len(entry.runs)} runs, {name}"


def _record(entry: Entry, row: Row, row_id: int, mark: Mark, folder: Path, *, old: str = "") -> str:
    setting = next(iter(entry.speeds), None)
    # "trained" stands beside the name here, not in a column of its own.
    cells = _old_cells(row) if old else [entry.title, *entry_cells(entry, setting)[1:-1]]
    cells[1:1] = [entry.backbone, entry.data]
    shape = "square hollow" if entry.control else mark.shape + " pierced" * entry.trained
    dot = f'<i class="{shape}" style="--light:{mark.light};--dark:{mark.dark}"></i>'
    first = _name_cell(cells[0], f" ({old})" if old else "", dot, links_of(row), folder)
    found = [first]
    for (name, sort_by, kind), text in zip(_COLUMNS[1:], cells[1:], strict=True):
        value = sort_by(entry) if sort_by and not old else None
        if old:
            value = _old_value(name, row)
        elif name in _OF_SPEED and setting:
            value = _OF_SPEED[name](entry.speeds[setting])
        key = "" if value is None else f' data-v="{value:.10g}"'
        text, _, spread = text.partition(" [") if name == "GMACs" else (text, "", "")
        small = f"<small>[{escape(spread)}</small>" if spread else ""
        found.append(f'<td class="{kind}"{key}>{escape(text)}{small}</td>')
    kind = ' class="old" hidden' if old else ' class="guest"' if entry.guest else ""
    return f'<tr data-row="{row_id}" data-entry="{entry.id}"{kind}>{"".join(found)}</tr>'


def _name_cell(name: str, more: str, dot: str, links: Links, folder: Path) -> str:
    """The first cell: a button that opens the whole row, and the name, which leads to the paper."""
    links = links.seen_from(folder)
    label = f'<span title="{escape(name + more)}">{escape(name + more)}</span>'
    first = links.paper or links.page or links.code
    if first:
        about = escape(f"{links.title}" if links.paper else f"{name}: documentation")
        label = f'<a href="{escape(first)}" aria-label="{about}" rel="noreferrer">{label}</a>'
    others = [("code", links.code, "official code"), ("page", links.page, "documentation")]
    extra = "".join(
        f'<a class="{kind}" href="{escape(url)}" title="{what}" aria-label="{what} of '
        f'{escape(name)}" rel="noreferrer"></a>'
        for kind, url, what in others
        if url and url != first
    )
    button = (
        f'<button type="button" aria-expanded="false" aria-label="the whole row">{dot}</button>'
    )
    return f'<td class="word"><div>{button}{label}{extra}</div></td>'


def _failure(row: Row, row_id: int, folder: Path) -> str:
    """What failed, in its place in the table; the script widens the error over empty columns."""
    method, budget, error = failure_cells(row)
    data = str(row.get("dataset") or "")
    words = [str(row.get("backbone") or "?"), data, budget]
    cells = "".join(
        f'<td class="{kind}">{escape(text)}</td>'
        for text, kind in zip(words, ("word where", "word where", "word"), strict=True)
    )
    first = _name_cell(method, "", '<i class="failure"></i>', links_of(row), folder)
    return (
        f'<tr class="failure" data-row="{row_id}" data-method="{escape(method)}" '
        f'data-status="{escape(str(row.get("status")))}">{first}{cells}'
        f'<td class="error" colspan="{len(_COLUMNS) - 4}">{escape(error)}</td></tr>'
    )


def _old_value(name: str, row: Row) -> float | None:
    gmacs = row.get("gmacs")
    values = {
        "GMACs": gmacs.get("total") if isinstance(gmacs, dict) else gmacs,
        "Top-1 %": row.get("top1"),
        "img/s": row.get("imgs_per_s"),
    }
    return number(values.get(name))


def _old_cells(row: Row) -> list[str]:
    method, found = row.get("method") or DENSE, qualities(row)
    gmacs, top1, rate = (_old_value(name, row) for name in ("GMACs", "Top-1 %", "img/s"))
    return [
        ("dense" if method == DENSE else str(method)) + " (trained)" * bool(row.get("trained")),
        describe_budget(row.get("schedule")),
        describe_size(row),
        format_millions(row.get("params_m")),
        describe_tokens(row.get("tokens")).replace("->", "→"),
        "" if gmacs is None else format_gmacs(gmacs) + format_range(row),
        "",
        "",
        "" if top1 is None else f"{top1:.2f}",
        "",
        "",
        "",
        "" if rate is None else format_rate(rate),
        "",
        "",
        "",
        *fidelity_cells(fidelity(row)),
        *(shown(metric, found.get(metric.key)) for metric in METRICS),
    ]


def _failed(comparison: Comparison) -> str:
    if not comparison.failed:
        return ""
    items = []
    for row in comparison.failed:
        method = str(row.get("method") or DENSE)
        what = f"{row.get('backbone') or '?'} + {method} {describe_budget(row.get('schedule'))}"
        later = not any(row is gap for gap in comparison.gaps)
        meta = [time_of(row.get("created")), "a later run succeeded" if later else ""]
        command = f"<p><code>{escape(str(row['command']))}</code></p>" if row.get("command") else ""
        items.append(
            f"<li><p><strong>{escape(what.rstrip())}</strong> "
            f'<span class="meta">{escape(" · ".join(part for part in meta if part))}</span></p>'
            f"<p>{escape(str(row.get('error') or 'no reason recorded'))}</p>{command}</li>"
        )
    heading = runs_without_result(comparison.failed)
    return (
        f'<section class="card failed" id="failed"><h2>{heading}</h2>'
        f"<ol>{''.join(items)}</ol></section>"
    )
