"""The methods as text and as data: what `zoo list` and `zoo show` print.

What is said of the methods that come along is stored, see `zoo.cli.stored`.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from zoo.cli.stored import Stored
from zoo.run.messages import nearest

if TYPE_CHECKING:
    from reduction import Card
    from reduction.base import Reducer

WIDTH = 80

_SIGNALS = {
    "k": "keys",
    "v": "values",
    "cls_row": "class row",
    "column": "attention received",
    "attn": "whole map",
    "x_norm": "normed input",
    "out": "attention output",
    "x_in": "block input",
    "x_mid": "stream before the MLP",
    "mlp": "MLP output",
}


class NoSuchMethod(LookupError):
    """No method has that name; the message names the nearest ones."""


# ---------------------------------------------------------------------------------- the facts


def entries() -> dict[str, dict[str, Any]]:
    """Returns what is known of every method, by name, sorted."""
    return STORED.entries()


def select(pattern: str) -> list[str]:
    """Returns the names of the methods that match a shell pattern, or hold it as a part.

    Raises:
        NoSuchMethod: None does.
    """
    found = STORED.matching(pattern)
    if not found:
        raise NoSuchMethod(_unknown(pattern, list(entries())))
    return found


def entry(name: str) -> dict[str, Any]:
    """Returns what is known of one method.

    Raises:
        NoSuchMethod: There is none of that name.
    """
    found = entries()
    if name not in found:
        raise NoSuchMethod(_unknown(name, list(found)))
    return found[name]


def _unknown(name: str, known: Sequence[str]) -> str:
    hint = nearest(repr(name), map(repr, known)) or "zoo list names them all"
    return f"unknown reducer {name!r}; {hint}"


def describe(name: str) -> dict[str, Any]:
    """Returns the card, the arguments with their defaults, and what was shown of a method."""
    import reduction
    from reduction.registry import method
    from zoo.report import evidence

    cls = method(name)
    own = inspect.signature(cls.__init__).parameters  # not those that every method has
    parameters = list(own.values())[1:]
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
        "doc": inspect.getdoc(cls) or "",
    }


STORED = Stored("methods", "reduction.registry:METHODS", describe)


def attention_needs(reducer: Reducer) -> str:
    """Returns what a method, with its arguments as they are, needs from the attention."""
    from reduction.mixins.attention import OwnAttention

    words = [text for signal, text in _SIGNALS.items() if signal in reducer.needs]
    if isinstance(reducer, OwnAttention):
        words.append("its own attention")
    return ", ".join(words) or "nothing"


def counts(reducer: Reducer) -> str:
    """Returns whether every image keeps as many tokens."""
    from reduction.mixins.adaptive import Adaptive

    return "adaptive" if isinstance(reducer, Adaptive) else "fixed"


def paper(card: Card) -> str:
    """Returns authors, venue and year; "ours" for what nobody published."""
    return "ours" if card.venue == "ours" else f"{card.authors}, {card.venue} {card.year}"


# ---------------------------------------------------------------------------------- in words


def methods_table(names: Sequence[str]) -> str:
    """Returns one line per method, aligned for a terminal of 80 columns."""
    known = entries()
    rows = [("method", "kind", "train", "digits", "paper"), *(_row(known[name]) for name in names)]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    widths[1] = min(widths[1], 17)
    lines = []
    for row in rows:
        cells = [_cut(cell, width).ljust(width) for cell, width in zip(row, widths, strict=False)]
        left = WIDTH - sum(widths) - 2 * len(widths)
        lines.append("  ".join([*cells, _cut(row[-1], left)]).rstrip())
    note = (
        "train: whether the method has parts to train, or loses much without fine-tuning; digits: "
        "top-1 % of vit_digits at half the dense GMACs, off the shelf / trained. zoo show METHOD "
        "says more; --json says all."
    )
    return "\n".join([*lines, "", textwrap.fill(note, WIDTH)])


def _row(facts: Mapping[str, Any]) -> tuple[str, str, str, str, str]:
    words = ("no", "none"), ("maybe", "fine-tuning recommended")
    train = next((short for short, long in words if facts["training"].startswith(long)), "yes")
    numbers = facts["digits_at_half_cost"]
    pair = numbers["untrained"], numbers["trained"]
    digits = "/".join("-" if n is None else f"{n:.1f}" for n in pair)
    venue = f"{facts['venue']} {facts['year']}"
    venue = {"ours": "ours", "none": facts["authors"]}.get(facts["venue"], venue)
    return facts["name"], facts["kind"], train, digits, venue


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def page(name: str) -> str:
    """Returns everything about one method, for a terminal of 80 columns.

    Raises:
        NoSuchMethod: There is none of that name.
    """
    facts = entry(name)
    lines = [
        f"{name}: {facts['title']}",
        f"  {facts['authors']}, {facts['venue']} {facts['year']}",
    ]
    if facts["arxiv"]:
        lines.append(f"  https://arxiv.org/abs/{facts['arxiv']}")
    if facts["code"]:
        lines.append(f"  official code: {facts['code']} (licence: {facts['licence']})")
    lines += [f"  kind: {facts['kind']}; training: {facts['training']}"]
    lines += [f"  needs of the attention: {facts['attention']}; counts: {facts['counts']}"]
    if facts["needs_class_token"]:
        lines.append("  needs a class token")
    if facts["note"]:
        lines.append(f"  note: {facts['note']}")
    lines = [textwrap.fill(line, WIDTH, subsequent_indent="    ") for line in lines]
    text = "\n".join(reflowed(facts["doc"], WIDTH - 2)).rstrip()
    lines += ["", textwrap.indent(text, "  "), ""]
    budget = (
        "schedule.r=8"
        if facts["family"] == "constant_r"
        else "schedule=keep_rate schedule.rate=0.7"
    )
    lines += [
        "Command line:",
        f"  zoo eval weights=vit_digits reducer={name} \\\n    schedule=target_gmacs",
        f"  zoo eval backbone=deit_small reducer={name} task=flops \\\n    {budget}",
    ]
    if facts["arguments"]:
        lines.append("  its arguments and their defaults:")
        lines += [f"    reducer.{key}={typed(one)}" for key, one in facts["arguments"].items()]
    lines += [
        "Python:",
        f'  zoo.create_model("deit_small_patch16_224", "{name}")',
    ]
    return "\n".join(lines)


def typed(value: Any) -> str:
    """A value as it is typed on the command line."""
    from zoo.run.schema.check import shown

    return shown(value)


def reflowed(text: str, width: int) -> Iterator[str]:
    """Fills the paragraphs of a docstring anew; what is aligned by hand stays as it is."""
    paragraph: list[str] = []
    for line in [*text.splitlines(), ""]:
        indent = len(line) - len(line.lstrip())
        aligned = re.search(r"\S {2,}\S", line) is not None
        starts = re.match(r"\s*\*{0,2}\w+: ", line) is not None  # an argument
        goes_on = (
            paragraph
            and line.strip()
            and not (aligned or (starts and indent == _indent(paragraph[0])))
            and indent >= _indent(paragraph[0])
            and (len(paragraph) == 1 or indent == _indent(paragraph[-1]))
            and len(paragraph[-1]) > 60
        )
        if goes_on:
            paragraph.append(line)
            continue
        yield from _filled(paragraph, width)
        paragraph = [line] if line.strip() else []
        if not line.strip():
            yield ""


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _filled(paragraph: Sequence[str], width: int) -> list[str]:
    if not paragraph:
        return []
    if len(paragraph) == 1 and len(paragraph[0]) <= width:
        return list(paragraph)
    first = " " * _indent(paragraph[0])
    more = " " * (_indent(paragraph[1]) if len(paragraph) > 1 else len(first) + 4)
    words = " ".join(line.strip() for line in paragraph)
    return textwrap.wrap(words, width, initial_indent=first, subsequent_indent=more)


def print_json(value: Any) -> None:
    """Prints a value as JSON, indented."""
    print(json.dumps(value, indent=2, ensure_ascii=False, default=str))
