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
from reduction.base import Reducer
from reduction.mixins.adaptive import Adaptive
from reduction.mixins.attention import OwnAttention
from reduction.registry import method
from zoo.report import evidence

_SIGNALS = {
    "k": "keys",
    "v": "values",
    "cls_row": "class row",
    "column": "attention received",
    "attn": "whole map",
    "x_norm": "normed input",
    "out": "attention output",
    "x_mid": "stream before the MLP",
    "mlp": "MLP output",
}


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
    """Returns the card, the arguments with their defaults, and what was shown of a method."""
    cls = method(name)
    parameters = inspect.signature(cls).parameters.values()
    made = reduction.create(name)
    passed = evidence.fixtures().get(name, evidence.Fixtures(0, 0))
    top1 = evidence.digits().get(name, evidence.Digits(None, None))
    return {
        "name": name,
        **dataclasses.asdict(cls.card),
        "summary": (inspect.getdoc(cls) or "").partition("\n")[0],
        "site": cls.site,
        "needs": sorted(cls.needs),
        "needs_class_token": made.needs_class_token,
        "family": cls.family,
        "arguments": {
            p.name: None if p.default is p.empty else p.default
            for p in parameters
            if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        },
        "attention": attention_needs(made),
        "counts": counts(made),
        "fixtures": passed._asdict(),
        "digits_at_half_cost": top1._asdict(),
    }


def attention_needs(reducer: Reducer) -> str:
    """Returns what a method, with its arguments as they are, needs from the attention."""
    words = [text for signal, text in _SIGNALS.items() if signal in reducer.needs]
    if isinstance(reducer, OwnAttention):
        words.append("its own attention")
    return ", ".join(words) or "nothing"


def counts(reducer: Reducer) -> str:
    """Returns whether every image keeps as many tokens."""
    return "adaptive" if isinstance(reducer, Adaptive) else "fixed"


def paper(card: reduction.Card) -> str:
    """Returns authors, venue and year; "ours" for what nobody published."""
    return "ours" if card.venue == "ours" else f"{card.authors}, {card.venue} {card.year}"


def methods_table(names: Sequence[str]) -> str:
    """Returns one line per method, aligned for a terminal."""
    shown, measured = evidence.fixtures(), evidence.digits()
    rows = [
        (
            "method",
            "kind",
            "training",
            "needs of attention",
            "counts",
            "licence",
            "fixtures",
            "digits",
            "paper",
        )
    ]
    for name in names:
        card, reducer = reduction.card(name), reduction.create(name)
        rows.append(
            (
                name,
                card.kind,
                card.training,
                attention_needs(reducer),
                counts(reducer),
                card.licence or "-",
                str(shown.get(name, "-")),
                str(measured.get(name, "- / -")),
                "ours" if card.venue == "ours" else f"{card.title} ({card.venue} {card.year})",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    lines = [
        "  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[-1]])
        for row in rows
    ]
    note = (
        "licence: of the official code; fixtures: passed; digits: top-1 % at half the dense GMACs, "
        "off the shelf / trained"
    )
    return "\n".join([*lines, "", note])


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
