"""Rows of `task=select` as tables: what each selector leaves, beside its two controls."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

from zoo.report.identity import backbone
from zoo.report.words import describe_budget, format_gmacs, is_dense, number
from zoo.results.rows import Row

#: Name in the row, heading, what it means, and decimals.
_METRICS = (
    ("coverage_mean", "Coverage error", "1 - cosine of a patch to the nearest kept one, mean", 3),
    ("coverage_worst", "Worst patch", "the same of the worst patch of an image", 3),
    ("knn_top1", "k-NN %", "class by the nearest neighbours of the mean of the kept tokens", 1),
    ("recall1", "Recall@1 %", "the nearest image is of the same class", 1),
    ("map", "mAP %", "of finding images of the same class", 1),
    ("agreement", "As dense %", "same k-NN class as by all tokens of the dense tower", 1),
)
COLUMNS = ("Tokens", "Selector", *(heading for _, heading, _, _ in _METRICS), "GMACs")
MEANINGS = {heading: meaning for _, heading, meaning, _ in _METRICS}
_CONTROLS = "random: so many tokens by lot, mean ± standard deviation of the draws; smaller image: "
_CONTROLS += "all tokens of the image at a lower resolution, in the tower's own cost"


class Section(NamedTuple):
    """Selectors on the same tower, images and gallery.

    Attributes:
        title: Of what.
        lines: Cells under `COLUMNS`, fewest tokens last.
        note: What the controls are.
    """

    title: str
    lines: Sequence[Sequence[str]]
    note: str = _CONTROLS


def sections(rows: Iterable[Row]) -> list[Section]:
    """One for every tower, images and gallery; of a selector's runs there the latest counts."""
    groups: dict[str, dict[str, Row]] = {}
    for row in sorted(rows, key=lambda row: str(row.get("created") or "")):
        found = row.get("select")
        if row.get("status") == "ok" and isinstance(found, Mapping) and found.get("by_keep"):
            groups.setdefault(_title(row, found), {})[_selector(found)] = row
    return [Section(title, _lines(group)) for title, group in groups.items()]


def _title(row: Row, found: Mapping[str, Any]) -> str:
    method = (
        "" if is_dense(row) else f" + {row.get('method')} {describe_budget(row.get('schedule'))}"
    )
    data = f"{row.get('dataset')} ({row.get('split')}), {found.get('n_images')} images"
    where = f"{'final norm' if found.get('norm') else 'output'} of block {found.get('block')}"
    gallery = f"{found.get('gallery')} gallery of {found.get('n_gallery')}"
    return f"Selectors · {backbone(row)}{method.rstrip()} · {data} · {where} · {gallery}"


def _selector(found: Mapping[str, Any]) -> str:
    """Name and arguments that were given, as text."""
    given = found.get("selector")
    given = given if isinstance(given, Mapping) else {}
    more = [f"{k}={v}" for k, v in given.items() if k != "name" and v is not None]
    return " ".join([str(given.get("name") or "?"), *more])


def _lines(group: Mapping[str, Row]) -> list[list[str]]:
    """Selectors by number of tokens, and behind each number the controls."""
    names = _short(group)
    by_keep: dict[int, list[tuple[str, Mapping[str, Any]]]] = {}
    controls: dict[int, list[tuple[str, Mapping[str, Any]]]] = {}
    for key, row in group.items():
        cost = (row.get("gmacs") or {}).get("total")
        for entry in row["select"]["by_keep"]:
            keep = int(entry["keep"])
            own = {"gmacs": cost, **(entry.get("selector") or {})}
            by_keep.setdefault(keep, []).append((names[key], own))
            small = entry.get("resolution") or {}
            # Equal for all selectors of a group, up to the seeds of the draws.
            controls[keep] = [("random", {"gmacs": cost, **(entry.get("random") or {})})]
            if small:
                controls[keep].append((f"smaller image, {small.get('n_tokens')}", small))
    return [
        [str(keep), name, *_cells(values)]
        for keep in sorted(by_keep, reverse=True)
        for name, values in [*sorted(by_keep[keep], key=lambda pair: pair[0]), *controls[keep]]
    ]


def _short(group: Mapping[str, Row]) -> dict[str, str]:
    """Names alone, with arguments where a name occurs twice."""
    first = [key.partition(" ")[0] for key in group]
    return {
        key: key if first.count(name) > 1 else name for key, name in zip(group, first, strict=True)
    }


def _cells(values: Mapping[str, Any]) -> list[str]:
    cells = []
    for name, _, _, decimals in _METRICS:
        value, spread = number(values.get(name)), number(values.get(f"{name}_spread"))
        text = "" if value is None else f"{value:.{decimals}f}"
        cells.append(text if spread is None or not text else f"{text} ± {spread:.{decimals}f}")
    cost = number(values.get("gmacs"))
    return [*cells, "" if cost is None else format_gmacs(cost)]


def as_markdown(found: Sequence[Section], plain: Any) -> list[str]:
    """Lines of the Markdown report.

    Args:
        found: The tables.
        plain: Escapes a text for Markdown.
    """
    lines: list[str] = []
    for section in found:
        lines += [f"## {plain(section.title)}", "", "| " + " | ".join(COLUMNS) + " |"]
        lines.append("|" + "|".join("--:" if i != 1 else ":--" for i in range(len(COLUMNS))) + "|")
        lines += ["| " + " | ".join(map(plain, cells)) + " |" for cells in section.lines]
        lines += ["", f"- {plain(section.note)}", ""]
    return lines


def as_console(found: Sequence[Section]) -> list[str]:
    """One block of text for each table."""
    blocks = []
    for section in found:
        widths = [max(map(len, column)) for column in zip(COLUMNS, *section.lines, strict=True)]
        rows = [
            "  ".join(
                cell.ljust(width) if i == 1 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
            ).rstrip()
            for cells in (COLUMNS, *section.lines)
        ]
        rule = "─" * max(map(len, rows))
        body = [f"  {line}" for line in (rows[0], rule, *rows[1:])]
        blocks.append("\n".join([section.title, *body, section.note]))
    return blocks


def as_html(found: Sequence[Section]) -> str:
    """Tables for the page."""
    parts = []
    for section in found:
        heads = "".join(
            f'<th scope="col" title="{escape(MEANINGS.get(name, ""))}">{escape(name)}</th>'
            for name in COLUMNS
        )
        body = "".join(
            "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"
            for cells in section.lines
        )
        parts.append(
            f'<section class="card selectors"><h2>{escape(section.title)}</h2>'
            f"<table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>"
            f'<p class="meta">{escape(section.note)}</p></section>'
        )
    return "\n".join(parts)
