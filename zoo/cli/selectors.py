"""The selectors as text and as data: what `zoo list --selectors` and `zoo show NAME` print.

As of the methods, what is said of those that come along is stored, in `assets/selectors.json`.
"""

from __future__ import annotations

import dataclasses
import inspect
import textwrap
from collections.abc import Sequence
from typing import Any

from zoo.cli.catalogue import WIDTH, NoSuchMethod, reflowed
from zoo.cli.stored import Stored
from zoo.run.messages import nearest

_READS = {
    "attention": "class row",
    "column": "attention received",
    "k": "keys",
    "q": "queries of the next block",
}


def entries() -> dict[str, dict[str, Any]]:
    """Returns what is known of every selector, by name, sorted."""
    return STORED.entries()


def select(pattern: str) -> list[str]:
    """Returns the names that match a shell pattern, or hold it as a part.

    Raises:
        NoSuchMethod: None does.
    """
    found = STORED.matching(pattern)
    if not found:
        hint = nearest(repr(pattern), map(repr, entries())) or "zoo list --selectors names them all"
        raise NoSuchMethod(f"unknown selector {pattern!r}; {hint}")
    return found


def unknown(name: str) -> NoSuchMethod:
    """Returns what to raise for a name that neither a method nor a selector has."""
    from zoo.cli import catalogue

    known = sorted({*catalogue.entries(), *entries()})
    hint = nearest(repr(name), map(repr, known))
    hint = hint or "zoo list and zoo list --selectors name them all"
    return NoSuchMethod(f"unknown method or selector {name!r}; {hint}")


def describe(name: str) -> dict[str, Any]:
    """Returns the card, the arguments with their defaults, and what a selector reads."""
    from reduction.selection.registry import SELECTORS, create_selector

    cls = SELECTORS.get(name)
    made = create_selector(name)
    reads = [_READS[what] for what in made.reads]
    if made.from_last:
        reads += ["queries and keys of the next block"]
    if made.shallow_block(24) is not None:
        reads.append("the same of a shallower block")
    return {
        "name": name,
        **dataclasses.asdict(cls.card),
        "summary": (inspect.getdoc(cls) or "").partition("\n")[0],
        "reads": ", ".join(reads) or "features alone",
        "neighbours": made.raster,
        "projected": made.projected,
        "arguments": {p.name: p.default for p in inspect.signature(cls).parameters.values()},
        "doc": inspect.getdoc(cls) or "",
    }


STORED = Stored("selectors", "reduction.selection.registry:SELECTORS", describe)


def table(names: Sequence[str]) -> str:
    """Returns one line per selector, aligned for a terminal of 80 columns."""
    known = entries()
    rows = [("selector", "kind", "reads", "paper")]
    for name in names:
        facts = known[name]
        venue = {"none": "folklore"}.get(facts["venue"], f"{facts['venue']} {facts['year']}")
        rows.append((name, facts["kind"], facts["reads"], venue))
    widths = [max(len(row[c]) for row in rows) for c in range(4)]
    widths[2] = min(widths[2], WIDTH - widths[0] - widths[1] - widths[3] - 6)
    lines = []
    for row in rows:
        cells = [
            (cell if len(cell) <= width else cell[: width - 1] + "…").ljust(width)
            for cell, width in zip(row, widths, strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    note = (
        "reads: of the attention of the last block but one; 'features alone' needs none, and no "
        "class token. zoo show NAME says more; --json says all."
    )
    return "\n".join([*lines, "", textwrap.fill(note, WIDTH)])


def page(name: str) -> str:
    """Returns everything about one selector, for a terminal of 80 columns.

    Raises:
        NoSuchMethod: There is none of that name.
    """
    from zoo.cli.catalogue import typed

    facts = entries().get(name)
    if facts is None:
        raise NoSuchMethod(f"unknown selector {name!r}; zoo list --selectors names them all")
    lines = [
        f"{name}: {facts['title']}",
        f"  {facts['authors']}, {facts['venue']} {facts['year']}",
    ]
    if facts["arxiv"]:
        lines.append(f"  https://arxiv.org/abs/{facts['arxiv']}")
    if facts["code"]:
        lines.append(f"  official code: {facts['code']} (licence: {facts['licence']})")
    lines.append(f"  kind: {facts['kind']}, a selector behind the tower; training: none")
    lines.append(f"  reads: {facts['reads']}")
    if facts["note"]:
        lines.append(f"  note: {facts['note']}")
    lines = [textwrap.fill(line, WIDTH, subsequent_indent="    ") for line in lines]
    text = "\n".join(reflowed(facts["doc"], WIDTH - 2)).rstrip()
    lines += ["", textwrap.indent(text, "  "), ""]
    lines += ["Command line:", f"  zoo eval weights=vit_digits task=select selector={name}"]
    lines.append("  its arguments and their defaults:")
    lines += [f"    selector.{key}={typed(one)}" for key, one in facts["arguments"].items()]
    lines += [
        "Python:",
        f'  zoo.selector(tower, "{name}", keep=64)(images)  # (B, 64, C)',
        f'  reduction.select(features, 64, "{name}", ...)',
    ]
    return "\n".join(lines)
