"""`python -m tests.figures`: the measures of the house, which `test_figures.py` holds.

The import graph is read from the source: imports inside functions count, those under
`TYPE_CHECKING` do not.
"""

from __future__ import annotations

import ast
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from torch import nn

import reduction
from reduction.config import Revised
from reduction.options import Optioned
from reduction.registry import method

ROOT = Path(reduction.__file__).resolve().parents[1]
PACKAGES = ("reduction", "zoo")

#: From the top of the house to the bottom: a floor imports those below it, rooms of one floor each
#: other as well.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("zoo.cli", "zoo.__main__"),
    ("zoo.run",),
    ("zoo",),
    ("zoo.api", "zoo.backbones"),
    ("zoo.checkpoint",),
    ("zoo.build", "zoo.attaching", "zoo.lit"),
    ("zoo.budget",),
    ("zoo.measure", "zoo.export", "zoo.visual"),
    ("zoo.cost",),
    ("zoo.model",),
    ("zoo.plugins", "zoo.models", "zoo.libraries"),
    ("zoo.adapters",),
    ("zoo.published",),
    ("zoo.errors", "zoo.version"),
    ("reduction",),
)
#: Rooms beside the stairs: who may use them, and which rooms they may use themselves.
BESIDE: dict[str, tuple[str, ...]] = {
    "zoo.data": ("zoo.errors", "zoo.version", "reduction"),
    # Rows are refused in the words of the tables, which import nothing.
    "zoo.results": ("zoo.errors", "zoo.version", "zoo.report.words"),
    "zoo.report": ("zoo.results", "zoo.errors", "zoo.version"),
}
#: Inside `reduction`, likewise from top to bottom.
REDUCTION: tuple[tuple[str, ...], ...] = (
    ("reduction",),
    ("reduction.methods", "reduction.selectors"),
    ("reduction.selection",),
    ("reduction.registry",),
    ("reduction.mixins",),
    ("reduction.base", "reduction.options", "reduction.schedules"),
    ("reduction.functional",),
    ("reduction.assignment",),
    ("reduction.tokens",),
    (
        "reduction.counts",
        "reduction.config",
        "reduction.checks",
        "reduction.arguments",
        "reduction.eager",
    ),
    ("reduction.errors",),
)


class Figure(NamedTuple):
    """One measure.

    Attributes:
        what: In words.
        value: As it is.
        limit: What it may be at most, or at least where `least` is set.
        least: Whether the limit is a lower one.
    """

    what: str
    value: float
    limit: float
    least: bool = False

    @property
    def holds(self) -> bool:
        """Whether the value is within the limit."""
        return self.value >= self.limit if self.least else self.value <= self.limit


def modules() -> dict[str, Path]:
    """Name and file of every module of the packages."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


def _type_only(tree: ast.AST) -> set[int]:
    """Nodes that run for type checkers alone."""
    skipped: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for line in node.body:
                skipped |= {id(inner) for inner in ast.walk(line)}
    return skipped


def _targets(node: ast.Import | ast.ImportFrom, name: str, known: dict[str, Path]) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
        return
    base = node.module or ""
    if node.level:
        parts = name.split(".")
        if known[name].name != "__init__.py":
            parts = parts[:-1]
        base = ".".join([*parts[: len(parts) - node.level + 1], *base.split(".")]).rstrip(".")
    for alias in node.names:
        inner = f"{base}.{alias.name}"
        yield inner if inner in known else base


def imports(known: dict[str, Path] | None = None) -> dict[str, set[str]]:
    """The modules of the packages that each of them imports, anywhere in its source."""
    known = modules() if known is None else known
    graph: dict[str, set[str]] = {}
    for name, path in known.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        skipped = _type_only(tree)
        graph[name] = {
            target
            for node in ast.walk(tree)
            if isinstance(node, ast.Import | ast.ImportFrom) and id(node) not in skipped
            for target in _targets(node, name, known)
            if target in known and target != name
        }
    return graph


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import each other, directly or not."""
    reach: dict[str, set[str]] = {}
    for start in graph:
        seen: set[str] = set()
        todo = list(graph[start])
        while todo:
            name = todo.pop()
            if name not in seen:
                seen.add(name)
                todo += graph[name]
        reach[start] = seen
    groups = {
        tuple(sorted(other for other in reach[name] if name in reach[other]))
        for name in graph
        if name in reach[name]
    }
    return [list(group) for group in sorted(groups)]


def _room(module: str, floors: tuple[tuple[str, ...], ...]) -> int | None:
    """The floor that a module lies on: that of the longest name that it begins with."""
    best: tuple[int, int] | None = None
    for i, floor in enumerate(floors):
        for room in floor:
            inside = module == room or (module.startswith(f"{room}.") and room not in PACKAGES)
            if room == "reduction" and floors is FLOORS:
                inside = module.partition(".")[0] == room
            if inside and (best is None or len(room) > best[0]):
                best = (len(room), i)
    return None if best is None else best[1]


def climbs(graph: dict[str, set[str]]) -> list[str]:
    """Imports that go up the stairs, or into a room that they may not use."""
    wrong = []
    for name, targets in sorted(graph.items()):
        for target in sorted(targets):
            aside = [room for room in BESIDE if (name + ".").startswith(room + ".")]
            if aside:
                allowed = (*BESIDE[aside[0]], aside[0])
                fits = any((target + ".").startswith(room + ".") for room in allowed)
            elif any((target + ".").startswith(room + ".") for room in BESIDE):
                fits = (_room(name, FLOORS) or 0) < len(FLOORS) - 2
            else:
                floors = REDUCTION if name.startswith("reduction") else FLOORS
                here, there = _room(name, floors), _room(target, floors)
                fits = here is not None and there is not None and here <= there
            if not fits:
                wrong.append(f"{name} imports {target}")
    return wrong


def overridable() -> list[str]:
    """Public names that an author of a method finds on `Reducer` and may override."""
    given = {n for base in (nn.Module, Optioned, Revised) for n in dir(base)}
    stated = {*vars(reduction.Reducer), *reduction.Reducer.__annotations__}
    return sorted(n for n in stated if not n.startswith("_") and n not in given)


def rankers() -> list[str]:
    """Methods that `ScoreReducer` serves."""
    return [n for n in reduction.list_methods() if issubclass(method(n), reduction.ScoreReducer)]


def lines(path: Path) -> int:
    """Lines of a file."""
    return len(path.read_text(encoding="utf-8").splitlines())


def figures() -> list[Figure]:
    """All measures, with their limits."""
    known = modules()
    files = {name: lines(path) for name, path in known.items()}
    methods = [n for k, n in files.items() if k.startswith("reduction.methods.")]
    loose = [p for p in (ROOT / "zoo").glob("*.py") if p.is_file()]
    graph = imports(known)
    return [
        Figure("names that an author of a Reducer may override", len(overridable()), 15),
        Figure("methods that ScoreReducer serves", len(rankers()), 10, least=True),
        Figure("lines of the median method file", statistics.median(methods), 110),
        Figure("lines of the largest method file", max(methods), 300),
        *(
            Figure(
                f"lines of the largest file of {package}/",
                max(n for k, n in files.items() if k.partition(".")[0] == package),
                450,
            )
            for package in PACKAGES
        ),
        Figure("loose modules in zoo/", len(loose), 8),
        Figure("import circles", len(circles(graph)), 0),
        Figure("imports that go up the floors", len(climbs(graph)), 0),
    ]


def main() -> int:
    """Print all measures, and what breaks them."""
    for figure in figures():
        sign = ">=" if figure.least else "<="
        mark = "" if figure.holds else "   NOT HELD"
        print(f"{figure.value:6g}  {sign} {figure.limit:<4g} {figure.what}{mark}")
    graph = imports()
    for group in circles(graph):
        print("circle:", ", ".join(group))
    for climb in climbs(graph):
        print("up:", climb)
    return 0 if all(figure.holds for figure in figures()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
