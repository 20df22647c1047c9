"""Every promised name is there, and every example in a docstring runs."""

from __future__ import annotations

import ast
import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(path for top in ("reduction", "zoo") for path in (ROOT / top).rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def promises(path: Path) -> bool:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    targets = [t for node in tree.body if isinstance(node, ast.Assign) for t in node.targets]
    return any(isinstance(t, ast.Name) and t.id == "__all__" for t in targets)


@pytest.mark.parametrize("name", [module_name(path) for path in SOURCES if promises(path)])
def test_every_name_of_all_is_there(name: str) -> None:
    module = importlib.import_module(name)
    missing = [public for public in module.__all__ if not hasattr(module, public)]
    assert not missing and len(set(module.__all__)) == len(module.__all__)


@pytest.mark.parametrize("package", ["reduction", "zoo"])
def test_a_star_import_works(package: str) -> None:
    space: dict[str, object] = {}
    exec(f"from {package} import *", space)
    assert set(importlib.import_module(package).__all__) <= set(space)


EXAMPLES = [module_name(path) for path in SOURCES if ">>>" in path.read_text(encoding="utf-8")]


def test_there_are_examples() -> None:
    assert EXAMPLES


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_in_docstrings_run(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert result.attempted > 0 and result.failed == 0
