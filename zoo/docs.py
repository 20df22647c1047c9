"""The parts of the documentation that follow from the code: `python -m zoo.docs` writes them.

The table of methods in README.md (between two marker lines) and docs/methods/index.md come from the
cards of the registered methods. `python -m zoo.docs --check` writes nothing and fails if they are
out of date.
"""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Sequence
from pathlib import Path

from zoo.errors import ZooError

BEGIN = "<!-- methods: written by `python -m zoo.docs`, do not edit by hand -->"
END = "<!-- end of methods -->"
_INDEX = Path("docs/methods/index.md")
_README = Path("README.md")


def methods_table(pages: str) -> str:
    """Return the Markdown table of all methods.

    Args:
        pages: Folder of the method pages as seen from the table, e.g. ``docs/methods/``.
    """
    import reduction

    lines = [
        "| `reducer=` | paper | what happens to tokens | training | official code |",
        "|---|---|---|---|---|",
    ]
    for name in reduction.list_methods():
        card = reduction.card(name)
        paper = "none"
        if card.arxiv:
            text = f"{card.authors}, {card.venue} {card.year}"
            paper = f"[{text}](https://arxiv.org/abs/{card.arxiv})"
        code = "none"
        if card.code:
            code = f"[{card.code.removeprefix('https://github.com/')}]({card.code})"
            code += f" ({card.licence})" if card.licence else ""
        lines.append(
            f"| [`{name}`]({pages}{name}.md) | {paper} | {card.kind} | {card.training} | {code} |"
        )
    return "\n".join(lines)


def index_page() -> str:
    """Return docs/methods/index.md."""
    import reduction
    from zoo.catalogue import describe

    text = [
        BEGIN,
        "# Methods",
        "",
        'Every name works in Python (`zoo.create_model(NAME, reducer="tome")`) and on the command',
        "line (`reducer=tome`), with any [schedule](../conventions.md#schedules).",
        "",
        methods_table(""),
        "",
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


def _yaml(value: object) -> str:
    """Spell a default as it is typed on the command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def readme_with_table(text: str) -> str:
    """Return README text with the table between the markers replaced.

    Raises:
        ZooError: The markers are missing.
    """
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ZooError(f"README.md: expected the lines {BEGIN!r} and {END!r} around the table")
    return f"{head}{BEGIN}\n{methods_table('docs/methods/')}\n{END}{tail}"


def generated(root: Path) -> dict[Path, str]:
    """Return what the generated files should hold, by path.

    Args:
        root: Folder of the checkout.

    Raises:
        ZooError: This is no checkout, or the README lost its markers.
    """
    readme = root / _README
    if not readme.is_file():
        raise ZooError(f"no {readme}; run this in a checkout, the installed package has no docs")
    return {
        readme: readme_with_table(readme.read_text(encoding="utf-8")),
        root / _INDEX: index_page(),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Write the generated parts, or check them; return the exit code."""
    parser = argparse.ArgumentParser("python -m zoo.docs", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, fail if out of date")
    arguments = parser.parse_args(argv)
    try:
        pages = generated(Path(__file__).resolve().parents[1])
    except ZooError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    stale = [
        p for p, text in pages.items() if not p.is_file() or p.read_text(encoding="utf-8") != text
    ]
    for path in stale:
        if arguments.check:
            print(f"out of date: {path}; run `python -m zoo.docs`", file=sys.stderr)
        else:
            path.write_text(pages[path], encoding="utf-8")
            print(f"wrote {path}")
    return 1 if stale and arguments.check else 0


if __name__ == "__main__":
    sys.exit(main())
