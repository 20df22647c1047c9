"""Rows as Markdown and as plain text for the console."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from zoo.report.compare import compare
from zoo.report.entry import Comparison, Entry, View
from zoo.report.links import links_of
from zoo.report.notes import CONVENTION, environment
from zoo.report.quality import METRICS, shown
from zoo.report.readings import Speed
from zoo.report.selection import as_console, as_markdown, sections
from zoo.report.words import (
    describe_budget,
    describe_size,
    describe_tokens,
    format_gmacs,
    format_millions,
    format_range,
    format_rate,
    is_dense,
    summary_line,
    why_without_result,
)
from zoo.results.rows import Row

_WORDS = ("Method", "Budget", "Weights")  # columns of words, aligned left
COLUMNS = (
    *("Method", "Budget", "Input", "Params", "Tokens", "GMACs", "Reducer", "−GMACs", "Top-1 %"),
    *("Runs", "95 % interval", "Δ top-1", "img/s", "Speed-up", "Efficiency", "Memory"),
    *("Agreement", "KL", "Cosine"),
    *(metric.column for metric in METRICS),
    "Weights",
)


# --------------------------------------------------------------------------------- Markdown


def markdown_table(comparison: Comparison, title: str) -> str:
    """The report for people who read text: one table per view, Pareto points bold."""
    parts = [f"# {_md(title)}", ""]
    for view in comparison.views:
        if not view.combined:
            parts += _markdown_view(view)
    parts += as_markdown(sections(comparison.rows), _md)
    if comparison.failed:
        parts += ["## Runs without a result", ""]
        parts += [f"- {_md(summary_line(row))}" for row in comparison.failed]
        parts.append("")
    parts += _markdown_methods(comparison)
    count = len(comparison.rows)
    parts += [
        CONVENTION,
        "**Bold** rows are on the Pareto front: no other row is at least as cheap and at least as "
        "accurate, and better in one of the two. Differences (Δ) and savings are against the dense "
        "model of the same backbone and data.",
        "",
        f"{count} row{'s' * (count != 1)} · {_md(environment(comparison.rows))}",
    ]
    return "\n".join(parts) + "\n"


def _markdown_methods(comparison: Comparison) -> list[str]:
    """Where to read on about each method."""
    found = {}
    for entry in comparison.entries:
        links = links_of(entry.row)
        if not entry.dense and (links.paper or links.code):
            title = _md(links.title or "paper")
            parts = [f"[{title}]({links.paper})" if links.paper else title]
            parts += [f"[code]({links.code})"] if links.code else []
            found[str(entry.row.get("method"))] = ", ".join(parts)
    lines = [f"- {_md(name)}: {text}" for name, text in sorted(found.items())]
    return ["## Methods", "", *lines, ""] if lines else []


def _markdown_view(view: View) -> list[str]:
    columns, body = _grid(view)
    lines = [f"## {_md(view.label)}", ""]
    lines.append("| " + " | ".join(columns) + " |")
    lines.append("|" + "|".join(":--" if name in _WORDS else "--:" for name in columns) + "|")
    for entry, cells in zip(view.entries, body, strict=True):
        cells = [_md(cell) for cell in cells]
        if entry in view.front:
            cells = [f"**{cell}**" if cell else "" for cell in cells]
        lines.append("| " + " | ".join(cells) + " |")
    for row in view.failures:
        method, budget, error = (_md(text) for text in failure_cells(row))
        cells = [method, budget, error, *[""] * len(columns)]
        lines.append("| " + " | ".join(cells[: len(columns)]) + " |")
    notes = [f"- {_md(note)}" for note in view.notes]
    return [*lines, "", *notes, *([""] if notes else []), *_markdown_engines(view)]


def _markdown_engines(view: View) -> list[str]:
    """Efficiency in every setting, where there are several."""
    found = [
        name
        for name in view.settings
        if any(name in e.speeds and e.speeds[name].efficiency for e in view.entries if not e.dense)
    ]
    if len(found) < 2:
        return []
    lines = ["| Method | Budget | " + " | ".join(map(_md, found)) + " |"]
    lines.append("|:--|:--|" + "--:|" * len(found))
    for entry in view.entries:
        cells = [_efficiencies(entry.speeds.get(name)) for name in found]
        if not entry.is_reference and any(cells):
            lines.append("| " + " | ".join([_md(entry.title), _md(entry.budget), *cells]) + " |")
    about = (
        "Efficiency (speed-up over what the GMACs promise) against the dense model run alike, and "
        "behind the stroke against the library's own model, untouched."
    )
    return [about, "", *lines, ""]


def _efficiencies(speed: Speed | None) -> str:
    if speed is None or speed.efficiency is None:
        return ""
    texts = [format_share(speed.efficiency), format_share(speed.efficiency_over_timm)]
    return " / ".join(text for text in texts if text)


def _md(text: str) -> str:
    """Escape text for Markdown, table cells included."""
    text = re.sub(r"([\\`*_\[\]|~#])", r"\\\1", " ".join(str(text).split()))
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


# ---------------------------------------------------------------------------------- console


def table(rows: Iterable[Row]) -> str:
    """A plain-text table for the console; ``*`` marks the Pareto front.

    Args:
        rows: Rows as `zoo.results.rows.read_rows` gives them.

    Returns:
        Lines without a trailing newline; one block per backbone and data set, then failed runs.
    """
    comparison = compare(rows)
    blocks = [_console_view(view) for view in comparison.views if not view.combined]
    blocks += as_console(sections(comparison.rows))
    if comparison.failed:
        lines = [f"{runs_without_result(comparison.failed)}:"]
        blocks.append("\n".join(lines + [f"  {summary_line(row)}" for row in comparison.failed]))
    return "\n\n".join(blocks)


def _console_view(view: View) -> str:
    # What is left out would not fit; features say what answers say where there are answers.
    without = {"Input", "Params", "Tokens", "Reducer", "Efficiency", "KL", "Memory", "Weights"}
    if any("agreement" in entry.fidelity for entry in view.entries):
        without.add("Cosine")
    columns, body = _grid(view, without)
    for entry, cells in zip(view.entries, body, strict=True):
        cells[0] = entry.title
    marks = ["*" if entry in view.front else " " for entry in view.entries]
    widths = [max(map(len, column)) for column in zip(columns, *body, strict=True)]
    lines = [
        view.label,
        f"  {_line(columns, widths)}",
        "  " + "─" * len(_line(columns, widths)),
    ]
    lines += [f"{mark} {_line(cells, widths)}" for mark, cells in zip(marks, body, strict=True)]
    for row in view.failures:
        method, budget, error = failure_cells(row)
        lines.append(f"! {_line([method, budget], widths[:2])}  {error}")
    if view.front:
        name = "top-1" if view.metric.key == "top1" else view.metric.words
        lines.append(f"* on the Pareto front of {name} against GMACs; Δ and savings against dense")
    if any(entry.count > 1 for entry in view.entries):
        lines.append("± standard deviation over so many runs with seeds of their own")
    return "\n".join(line.rstrip() for line in lines)


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(
        cell.ljust(width) if index < 2 else cell.rjust(width)
        for index, (cell, width) in enumerate(zip(cells, widths, strict=True))
    )


# ------------------------------------------------------------------------------------ cells


def _grid(view: View, without: Collection[str] = ()) -> tuple[list[str], list[list[str]]]:
    """Column names and cells of a view; columns that nothing fills are left out."""
    rate = view.settings[0] if view.settings else None
    columns = list(COLUMNS)
    body = [entry_cells(entry, rate) for entry in view.entries]
    keep = [
        index
        for index, name in enumerate(columns)
        if name not in without and (index < 2 or any(cells[index] for cells in body))
    ]
    if not any(entry.trained for entry in view.entries):
        keep = [index for index in keep if columns[index] != "Weights"]
    return [columns[i] for i in keep], [[cells[i] for i in keep] for cells in body]


def entry_cells(entry: Entry, setting: str | None) -> list[str]:
    """The cells of one entry, empty where nothing was measured."""
    speed = entry.speeds.get(setting) if setting else None
    faster = speed if speed and not entry.is_reference else None
    share, memory = entry.reducer_share, speed.memory if speed else None
    return [
        entry.name,
        entry.budget,
        describe_size(entry.row),
        format_millions(entry.cost.get("params_m")),
        describe_tokens(entry.tokens).replace("->", "→"),
        "" if entry.gmacs is None else format_gmacs(entry.gmacs) + format_range(entry.cost),
        "" if share is None else f"{share:.1f} %",
        "" if entry.saved is None else f"{entry.saved:.1f} %",
        format_score(entry),
        str(entry.count) if entry.count > 1 else "",
        "" if entry.interval is None else "{:.2f} – {:.2f}".format(*entry.interval),
        signed(entry.delta),
        format_rate(speed.rate) if speed else "",
        format_times(faster.speedup if faster else None),
        format_share(faster.efficiency if faster else None),
        format_memory(memory),
        *fidelity_cells(entry.fidelity),
        *(shown(metric, entry.quality.get(metric.key)) for metric in METRICS),
        ("trained" if entry.trained else "off the shelf") if entry.measured else "",
    ]


def format_score(entry: Entry) -> str:
    """Top-1 in percent; the mean with the standard deviation where there are several runs."""
    if entry.top1 is None:
        return ""
    return f"{entry.top1:.2f}" + ("" if entry.spread is None else f" ± {entry.spread:.2f}")


def fidelity_cells(found: Mapping[str, float]) -> list[str]:
    """Agreement, divergence and cosine, empty where they were not measured."""
    patterns = (("agreement", "{:.1f} %"), ("kl", "{:.3g}"), ("cosine", "{:.3f}"))
    return [text.format(found[name]) if name in found else "" for name, text in patterns]


def format_times(speedup: float | None) -> str:
    """A speed-up, empty for None.

    >>> format_times(1.7), format_times(None)
    ('×1.70', '')
    """
    return f"×{speedup:.2f}" if speedup else ""


def format_share(efficiency: float | None) -> str:
    """An efficiency in percent, empty for None.

    >>> format_share(0.973), format_share(None)
    ('97 %', '')
    """
    return "" if efficiency is None else f"{100 * efficiency:.0f} %"


def format_memory(mebibytes: float | None) -> str:
    """Peak memory, empty for None.

    >>> format_memory(812.3), format_memory(None)
    ('812 MiB', '')
    """
    return "" if mebibytes is None else f"{mebibytes:,.0f} MiB"


def failure_cells(row: Mapping[str, Any]) -> tuple[str, str, str]:
    """Method, budget, and what became of a run without a result."""
    method = "dense" if is_dense(row) else str(row.get("method"))
    return method, describe_budget(row.get("schedule")), why_without_result(row)


def runs_without_result(rows: Iterable[Mapping[str, Any]]) -> str:
    """How many runs failed, and how many were skipped.

    >>> runs_without_result([{"status": "failed"}, {"status": "skipped"}, {"status": "failed"}])
    '2 failed runs, 1 skipped run'
    """
    found = [str(row.get("status")) for row in rows]
    kinds = ((found.count(kind), kind) for kind in ("failed", "skipped"))
    return ", ".join(f"{n} {kind} run{'s' * (n != 1)}" for n, kind in kinds if n)


def signed(value: float | None) -> str:
    """Points with a sign that aligns; empty for None.

    >>> signed(-0.5), signed(0.0), signed(None)
    ('−0.50', '0.00', '')
    """
    if value is None:
        return ""
    text = f"{abs(value):.2f}"
    return text if float(text) == 0 else ("+" if value > 0 else "−") + text
