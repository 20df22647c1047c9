"""What works with what, tried out: `python -m tests.composition` writes docs/composition.md.

Every reducer runs on a tiny model of every family, without a plugin and with CLCA. Whatever does
not work must be refused in one sentence, and the table shows the sentence. With `--check` nothing
is written, and a page that is out of date is an error.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import reduction
import zoo
from tests.cases import METHODS, WITHOUT_CLASS_TOKEN, Row, backbone, images
from zoo.errors import ZooError

PAGE = Path(__file__).resolve().parents[1] / "docs" / "composition.md"

#: Name in `tests.cases`: heading of the column.
COLUMNS = {
    "plain": "plain ViT",
    "registers": "registers",
    "distilled": "distilled DeiT",
    "dinov2": "DINOv2",
    "eva02": "EVA-02",
    "dinov3": "DINOv3",
    "jumbo": "Jumbo",
    "gap": "no class token",
}
PLUGINS = ("none", "clca")
NONE = Row("none")

HEAD = """\
<!-- written by `python -m tests.composition`, do not edit by hand -->
# What works with what

Each cell was tried out when this page was written, and a test tries all of them again: a tiny model
of the family, built and run with the reducer under the schedule of its tests, once without a plugin
and once with [`plugin=clca`](plugins/clca.md).

`yes`: both work. `no plugin`: works, but not with CLCA. `no`: refused. The numbers lead to the
sentence with which it is refused, or to the argument that it needs.

DINOv2 stands for LayerScale, EVA-02 for rotary positions with SwiGLU, DINOv3 for rotary positions
with registers and without absolute ones. In all of them every prefix token is out of a reducer's
reach: class token, distillation token, registers, and Jumbo's wide slots.
"""


def rows() -> dict[str, Row]:
    """The first test case of every method, and the dense model."""
    first = {row.name: row for row in reversed(METHODS)}
    return {"none": NONE} | {name: first[name] for name in reduction.list_methods()}


@functools.cache
def attempt(name: str, family: str, plugin: str) -> tuple[bool, str]:
    """Build and run one combination.

    Returns:
        Whether it works, and what has to be said about it: the refusal, or arguments it needs.

    Raises:
        AssertionError: If it runs but does something else than planned.
        Exception: Whatever is not a refusal in one sentence.
    """
    row = rows()[name]
    classless = family in WITHOUT_CLASS_TOKEN
    reducer = None if row is NONE else row.reducer(not classless)
    schedule = None if row is NONE else dict(row.schedule)
    plugins: list[Any] = [] if plugin == "none" else [plugin]
    try:
        model = zoo.wrap(backbone(family), reducer, schedule, plugins).eval()
        with torch.no_grad():
            logits, info = model(images(2), return_info=True)
    except ZooError as error:
        assert "\n" not in str(error) and len(str(error)) < 300, f"one sentence, not: {error}"
        return False, str(error)
    assert logits.shape == (2, 10) and logits.isfinite().all()
    planned = model.token_counts()
    if model.reducer is not None and isinstance(model.reducer, reduction.Adaptive):
        assert all(n <= most for (_, n), (_, most) in zip(info.tokens, planned, strict=True))
    else:
        assert list(info.tokens) == planned
    extra = row.without_class_token if classless else ()
    return True, " ".join(f"`reducer.{k}={v}`" for k, v in extra)


def cell(name: str, family: str) -> tuple[str, list[str]]:
    """Whether it works, in a word, and what has to be said about it."""
    found = [attempt(name, family, plugin) for plugin in PLUGINS]
    works = [ok for ok, _ in found]
    if not works[0]:  # without the method there is no point in what the plugin says
        return "no", [found[0][1]]
    said = dict.fromkeys(_sentence(text) for _, text in found if text)
    return "yes" if all(works) else "no plugin", list(said)


def written(name: str) -> list[tuple[str, list[str]]]:
    """The same of all families, as the page has it."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    row = next(line for line in lines if line.startswith(f"| {_link(name)} |"))
    notes = dict(line.split(". ", 1) for line in lines if line.split(". ")[0].isdigit())
    cells = [part.strip().split(" (") for part in row.split("|")[2:-1]]
    return [(word, [notes[n.rstrip(")")] for n in numbers]) for word, *numbers in cells]


def _link(name: str) -> str:
    return "`none`" if name == "none" else f"[`{name}`](methods/{name}.md)"


def page() -> str:
    """Return docs/composition.md."""
    notes: list[str] = []

    def numbered(name: str, family: str) -> str:
        word, said = cell(name, family)
        for text in said:
            if text not in notes:
                notes.append(text)
        return " ".join([word, *(f"({notes.index(text) + 1})" for text in said)])

    lines = [
        "| `reducer=` | " + " | ".join(COLUMNS.values()) + " |",
        "|---" * (len(COLUMNS) + 1) + "|",
    ]
    for name in rows():
        cells = [numbered(name, family) for family in COLUMNS]
        lines.append(f"| {_link(name)} | " + " | ".join(cells) + " |")
    text = [HEAD, *lines]
    if notes:
        text += ["", *(f"{i}. {note}" for i, note in enumerate(notes, 1))]
    return "\n".join([*text, ""])


def _sentence(text: str) -> str:
    return f"with {text}" if text.startswith("`") else text


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page, or check it; return the exit code."""
    parser = argparse.ArgumentParser("python -m tests.composition", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, fail if out of date")
    check = parser.parse_args(argv).check
    torch.set_num_threads(1)
    text = page()
    if PAGE.is_file() and PAGE.read_text(encoding="utf-8") == text:
        return 0
    if check:
        print(f"out of date: {PAGE}; run `python -m tests.composition`", file=sys.stderr)
        return 1
    PAGE.write_text(text, encoding="utf-8")
    print(f"wrote {PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
