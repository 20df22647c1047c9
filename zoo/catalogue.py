"""The methods as text and as data: what `zoo list` and `zoo show` print."""

from __future__ import annotations

import dataclasses
import fnmatch
import inspect
import json
import textwrap
from collections.abc import Sequence
from typing import Any

import reduction
from reduction.registry import method


def select(pattern: str) -> list[str]:
    """Returns the names of the methods that match a shell pattern, or hold it as a part.

    Raises:
        UnknownName: None does.
    """
    names = reduction.list_methods()
    found = fnmatch.filter(names, pattern) or [name for name in names if pattern in name]
    if not found:
        raise reduction.UnknownName("reducer", pattern, names)
    return found


def describe(name: str) -> dict[str, Any]:
    """Returns the card, the arguments with their defaults, and the first line of a method."""
    cls = method(name)
    parameters = inspect.signature(cls).parameters.values()
    return {
        "name": name,
        **dataclasses.asdict(cls.card),
        "summary": (inspect.getdoc(cls) or "").partition("\n")[0],
        "site": cls.site,
        "needs": sorted(cls.needs),
        "needs_class_token": cls.needs_class_token,
        "family": cls.family,
        "arguments": {
            p.name: None if p.default is p.empty else p.default
            for p in parameters
            if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        },
    }


def methods_table(names: Sequence[str]) -> str:
    """Returns one line per method: name, kind, training, paper."""
    cards = [reduction.card(name) for name in names]
    rows = [("method", "kind", "training", "paper")]
    for name, card in zip(names, cards, strict=True):
        rows.append((name, card.kind, card.training, f"{card.title} ({card.venue} {card.year})"))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]])
        for row in rows
    ]
    return "\n".join(lines)


def page(name: str) -> str:
    """Returns everything about one method, for a terminal."""
    facts = describe(name)
    card = reduction.card(name)
    lines = [f"{name}: {card.title}", f"  {card.authors}, {card.venue} {card.year}"]
    if card.arxiv:
        lines.append(f"  https://arxiv.org/abs/{card.arxiv}")
    if card.code:
        lines.append(f"  official code: {card.code} (licence: {card.licence})")
    lines += [f"  kind: {card.kind}; training: {card.training}"]
    if facts["needs_class_token"]:
        lines.append("  needs a class token")
    if card.note:
        lines.append(f"  note: {card.note}")
    lines += ["", textwrap.indent(inspect.getdoc(method(name)) or "", "  "), ""]
    arguments = " ".join(f"reducer.{key}={value}" for key, value in facts["arguments"].items())
    budget = (
        "schedule.r=8"
        if facts["family"] == "constant_r"
        else "schedule=keep_rate schedule.rate=0.7"
    )
    lines.append("Command line:")
    lines.append(f"  zoo eval weights=vit_digits reducer={name} schedule=target_gmacs")
    lines.append(f"  zoo eval backbone=deit_small reducer={name} {budget} task=flops")
    if arguments:
        lines.append(f"  its arguments and their defaults: {arguments}")
    lines.append("Python:")
    lines.append(f'  zoo.create_model("deit_small_patch16_224", reducer="{name}")')
    return "\n".join(lines)


def print_json(value: Any) -> None:
    """Prints a value as JSON, indented."""
    print(json.dumps(value, indent=2, ensure_ascii=False, default=str))
