"""The parts of the documentation that follow from the code: `python -m zoo.cli.docs` writes them.

The table of methods in README.md (between two marker lines) and docs/methods/index.md come from the
cards of the registered methods and from `zoo.report.evidence`; zoo/report/links.json, the links of
a report, comes from the cards, and so do zoo/assets/methods.json and selectors.json, from which
`zoo list` answers. The table in docs/selectors/index.md lies between the same two lines.
`python -m zoo.cli.docs --check` writes nothing and fails if they are out of date.
`--backbones` tries every vision transformer of timm and writes zoo/assets/backbones.json and
docs/coverage.md, see `zoo.cli.coverage`.
`--published` computes our GMACs of the settings in results/published.yaml, which docs/published.md
puts beside those of their authors, see `zoo.cli.published`.
"""

from __future__ import annotations

import argparse
import inspect
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from zoo.errors import ZooError

if TYPE_CHECKING:
    from reduction import Card

BEGIN = "<!-- methods: written by `python -m zoo.cli.docs`, do not edit by hand -->"
END = "<!-- end of methods -->"
_INDEX = Path("docs/methods/index.md")
_README = Path("README.md")
_LINKS = Path("zoo/report/links.json")
_METHODS = Path("zoo/assets/methods.json")
_SELECTORS = Path("zoo/assets/selectors.json")
_PUBLISHED = Path("docs/published.md")
_SELECTOR_INDEX = Path("docs/selectors/index.md")
# Selectors whose page is that of another one, or of the index.
_SHARED_PAGES = {"prumerge_plus": "prumerge", "random": "index"}
# Architectures that reduce tokens by themselves, whose name is the method of their rows.
_ARCHITECTURES = ("lookupvit",)


def methods_table(pages: str) -> str:
    """Return the short Markdown table of all methods.

    Args:
        pages: Folder of the method pages as seen from the table, e.g. ``docs/methods/``.
    """
    import reduction
    from zoo.report import evidence

    measured = evidence.digits()
    lines = [
        "| `reducer=` | paper | what happens to tokens | training | official code | digits |",
        "|---|---|---|---|---|---|",
    ]
    for name in reduction.list_methods():
        card = reduction.card(name)
        lines.append(
            f"| [`{name}`]({pages}{name}.md) | {_paper(card)} | {card.kind} | {card.training} | "
            f"{_licence(card)} | {measured.get(name, '- / -')} |"
        )
    return "\n".join(
        [
            *lines,
            "",
            "Official code: its licence; none where it was not released. Digits: top-1 in percent",
            "of `vit_digits` at half the dense GMACs, off the shelf / trained with the method;",
            "- where nobody ran it.",
        ]
    )


def full_table() -> str:
    """Return the Markdown table of all methods with everything that is known of them."""
    import reduction
    from zoo.cli import catalogue
    from zoo.report import evidence

    passed, measured = evidence.fixtures(), evidence.digits()
    lines = [
        "| `reducer=` | paper | what happens to tokens | training | needs from attention | counts "
        "| official code | fixtures | off the shelf | trained |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in reduction.list_methods():
        card, reducer = reduction.card(name), reduction.create(name)
        top1 = measured.get(name, evidence.Digits(None, None))
        cells = [
            f"[`{name}`]({name}.md)",
            _paper(card),
            card.kind,
            card.training,
            catalogue.attention_needs(reducer),
            catalogue.counts(reducer),
            _code(card),
            str(passed.get(name, "-")),
            evidence.percent(top1.untrained, top1.untrained_spread),
            evidence.percent(top1.trained, top1.trained_spread),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _paper(card: Card) -> str:
    from zoo.cli.catalogue import paper

    if card.arxiv:
        return f"[{paper(card)}](https://arxiv.org/abs/{card.arxiv})"
    return "ours" if card.venue == "ours" else "none"


def _code(card: Card) -> str:
    if not card.code:
        return "none"
    link = f"[{card.code.removeprefix('https://github.com/')}]({card.code})"
    return f"{link} ({_licence_words(card)})"


def _licence(card: Card) -> str:
    return f"[{_licence_words(card)}]({card.code})" if card.code else "none"


def _licence_words(card: Card) -> str:
    return "no licence" if card.licence == "none" else str(card.licence)


def index_page() -> str:
    """Return docs/methods/index.md."""
    import reduction
    from zoo.cli import choosing
    from zoo.cli.catalogue import describe

    text = [
        BEGIN,
        "# Methods",
        "",
        'Every name works in Python (`zoo.create_model(NAME, reducer="tome")`) and on the command',
        "line (`reducer=tome`), with any [schedule](../conventions.md#schedules).",
        "",
        "Needs from attention: what the attention of a reducing block has to hand over, with",
        "default arguments; the whole map gives up fused attention there. Counts: whether every",
        "image keeps as many tokens. Fixtures: files of tensors recorded from the official code",
        "or a port that are reproduced (`python -m tests.parity tests/golden`). The last two",
        "columns: top-1 in percent of `vit_digits` on 360 test images at half the dense GMACs,",
        "with its weights as they come and after training with the method, the best setting in",
        "[results/digits](../../results/digits), mean ± standard deviation where it was run with",
        "several seeds; - where nobody ran it.",
        "",
        full_table(),
        "",
        *choosing.section(),
        "## Arguments and where each method acts",
        "",
        "Sites: `pre` at a block's input, `mid` between its attention and its MLP, `post` at its",
        "output. The schedule family is what `schedule=target_gmacs` solves for.",
        "",
        "| `reducer=` | arguments and defaults | site | schedule family | class token |",
        "|---|---|---|---|---|",
    ]
    for name in reduction.list_methods():
        facts = describe(name)
        arguments = ", ".join(f"`{k}={_yaml(v)}`" for k, v in facts["arguments"].items())
        # An argument may decide what a method needs, so the class alone cannot answer.
        reducer = reduction.create(name)
        needs = "needed by default" if reducer.needs_class_token else "not needed"
        text.append(
            f"| [`{name}`]({name}.md) | {arguments or 'none'} | `{reducer.site}` | "
            f"`{reducer.family}` | {needs} |"
        )
    return "\n".join([*text, "", *_plugins(), "", END, ""])


def _plugins() -> list[str]:
    """Lines about the parts that go around a reducer."""
    from zoo.plugins.base import list_plugins, plugin_class

    lines = [
        "## Around a method",
        "",
        "Plugins go with any reducer, or none; see [what works with what](../composition.md).",
        "",
        "| `plugin=` | what it is | paper | arguments and defaults |",
        "|---|---|---|---|",
    ]
    for name in list_plugins():
        cls = plugin_class(name)
        facts = (inspect.getdoc(cls) or "").partition("\n")[0]
        paper = f"{cls.card.authors}, {cls.card.venue} {cls.card.year}"
        arguments = ", ".join(
            f"`{p.name}={_yaml(p.default)}`" for p in inspect.signature(cls).parameters.values()
        )
        lines.append(
            f"| [`{name}`](../plugins/{cls.page}.md) | {facts} | "
            f"[{paper}](https://arxiv.org/abs/{cls.card.arxiv}) | {arguments} |"
        )
    return lines


def links() -> str:
    """Return zoo/report/links.json: where methods, plugins and own architectures are explained."""
    import reduction
    from zoo.plugins.base import list_plugins, plugin_class

    found: dict[str, dict[str, str]] = {}
    for name in reduction.list_methods():
        found[name] = _links(reduction.card(name), f"docs/methods/{name}.md")
    for name in list_plugins():
        cls = plugin_class(name)
        found[name] = _links(cls.card, f"docs/plugins/{cls.page}.md")
    for name in _ARCHITECTURES:
        found[name] = {"page": f"docs/models/{name}.md"}
    return json.dumps(found, indent=1, ensure_ascii=False) + "\n"


def _links(card: Card, page: str) -> dict[str, str]:
    from zoo.cli.catalogue import paper

    published = card.venue not in ("ours", "none")
    found = {
        "title": f"{card.title} ({paper(card)})" if published else card.title,
        "paper": f"https://arxiv.org/abs/{card.arxiv}" if card.arxiv else "",
        "code": card.code or "",
        "page": page,
    }
    return {key: text for key, text in found.items() if text}


def _yaml(value: object) -> str:
    """Spell a default as it is typed on the command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def selectors_table() -> str:
    """Return the Markdown table of all selectors."""
    from zoo.cli import selectors
    from zoo.report import evidence

    passed = evidence.fixtures()
    lines = [
        "| `selector=` | paper | by | reads of the attention | arguments and defaults "
        "| official code | fixtures |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, facts in selectors.entries().items():
        card = _selector_card(name)
        arguments = ", ".join(f"`{k}={_yaml(v)}`" for k, v in facts["arguments"].items())
        cells = [
            f"[`{name}`]({selector_page(name)})",
            _paper(card),
            card.kind,
            facts["reads"],
            arguments,
            _code(card),
            str(passed.get(f"selector_{name}", "-")),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def selector_page(name: str) -> str:
    """File of docs/selectors that says what a selector does."""
    return f"{_SHARED_PAGES.get(name, name)}.md"


def _selector_card(name: str) -> Card:
    from reduction.selection.registry import SELECTORS

    return SELECTORS.get(name).card


def with_table(text: str, page: Path, table: str) -> str:
    """Return a page's text with the table between the markers replaced.

    Raises:
        ZooError: The markers are missing.
    """
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ZooError(f"{page}: expected the lines {BEGIN!r} and {END!r} around the table")
    return f"{head}{BEGIN}\n{table}\n{END}{tail}"


def readme_with_table(text: str) -> str:
    """Return README text with the table of methods replaced."""
    return with_table(text, _README, methods_table("docs/methods/"))


def generated(root: Path) -> dict[Path, str]:
    """Return what the generated files should hold, by path.

    Args:
        root: Folder of the checkout.

    Raises:
        ZooError: This is no checkout, or the README lost its markers.
    """
    from zoo.cli import selectors
    from zoo.cli.catalogue import STORED
    from zoo.report.published import FILE, page, read

    readme = root / _README
    if not readme.is_file():
        raise ZooError(f"no {readme}; run this in a checkout, the installed package has no docs")
    pages = {
        readme: readme_with_table(readme.read_text(encoding="utf-8")),
        root / _INDEX: index_page(),
        root / _LINKS: links(),
        root / _METHODS: STORED.text(),
        root / _SELECTORS: selectors.STORED.text(),
    }
    if (root / "results" / FILE).is_file():
        pages[root / _PUBLISHED] = page(read(root / "results"))
    index = root / _SELECTOR_INDEX
    if index.is_file():  # the rest of this page is written by hand
        text = index.read_text(encoding="utf-8")
        pages[index] = with_table(text, _SELECTOR_INDEX, selectors_table())
    return pages


def main(argv: Sequence[str] | None = None) -> int:
    """Write the generated parts, or check them; return the exit code."""
    parser = argparse.ArgumentParser("python -m zoo.cli.docs", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, fail if out of date")
    parser.add_argument(
        "--backbones", action="store_true", help="try timm's models on the meta device: minutes"
    )
    parser.add_argument(
        "--published", action="store_true", help="our GMACs of results/published.yaml: a minute"
    )
    arguments = parser.parse_args(argv)
    if arguments.published:
        from zoo.cli import published

        print(f"wrote {published.write(Path(__file__).resolve().parents[2] / 'results')}")
    if arguments.backbones:
        from zoo.cli import coverage

        coverage.write(Path(__file__).resolve().parents[2])
        print("wrote zoo/assets/backbones.json and docs/coverage.md")
        return 0
    try:
        pages = generated(Path(__file__).resolve().parents[2])
    except ZooError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    stale = [
        p for p, text in pages.items() if not p.is_file() or p.read_text(encoding="utf-8") != text
    ]
    for path in stale:
        if arguments.check:
            print(f"out of date: {path}; run `python -m zoo.cli.docs`", file=sys.stderr)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(pages[path], encoding="utf-8")
            print(f"wrote {path}")
    return 1 if stale and arguments.check else 0


if __name__ == "__main__":
    sys.exit(main())
