"""Finding fixtures, choosing a handler by their method, printing one line per case."""

from __future__ import annotations

import importlib
import json
import pkgutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import reduction
from reduction.base import Reducer
from tests.parity.fixture import Case, Fixture, Unsupported
from zoo.plugins.base import list_plugins

Handler = Callable[[Fixture], Iterator[Case]]
HANDLERS: dict[str, Handler] = {}


def handles(*methods: str) -> Callable[[Handler], Handler]:
    """Register a function for fixtures whose "method" is one of these."""

    def wrap(function: Handler) -> Handler:
        for method in methods:
            HANDLERS[method] = function
        return function

    return wrap


def load_handlers() -> None:
    """Import every module beside this one."""
    package = importlib.import_module("tests.parity")
    for module in pkgutil.iter_modules(package.__path__):
        if module.name != "__main__":
            importlib.import_module(f"tests.parity.{module.name}")


def key_of(fx: Fixture) -> str:
    """What handlers are registered under: the method, or the name for data-only files."""
    return fx.method or fx.name


def handler_of(fx: Fixture) -> Handler | None:
    """By method; files without one by the longest registered name that theirs begins with."""
    if fx.method:
        return HANDLERS.get(fx.method)
    names = [n for n in HANDLERS if fx.name == n or fx.name.startswith(f"{n}_")]
    return HANDLERS[max(names, key=len)] if names else None


def run_fixture(path: Path) -> list[Case]:
    """Run all cases of one fixture; whatever breaks becomes a failed case."""
    load_handlers()
    fx = Fixture(path)
    handler = handler_of(fx)
    if handler is None:
        return [Case(fx.name, "-", unsupported=f"no handler for method {key_of(fx)!r}")]
    cases: list[Case] = []
    try:
        for case in handler(fx):
            cases.append(case)
    except Unsupported as reason:
        cases.append(Case(fx.name, "-", unsupported=str(reason)))
    except Exception as error:  # a broken case must not hide the others
        cases.append(Case(fx.name, "-", failures=[f"{type(error).__name__}: {error}"]))
    return cases or [Case(fx.name, "-", failures=["the handler found no case"])]


def methods_of(name: str, built: Collection[str]) -> list[str]:
    """Registry names that a fixture is evidence for.

    The plugin that its name begins with; otherwise the method that it begins with, and the
    reducers that were built to run it. Selectors stand there as "selector_NAME".
    """
    selectors = {n: n for n in reduction.list_selectors()} | {"cdpruner": "dpp"}
    own = _longest(name.removeprefix("selector_"), selectors)
    if own and name.startswith("selector_"):
        return [f"selector_{selectors[own]}"]
    plugin = _longest(name, list_plugins())
    if plugin:
        return [plugin]
    method = _longest(name, reduction.list_methods())
    return sorted({*built, *([method] if method else [])})


def _longest(name: str, heads: Collection[str]) -> str:
    """The longest of `heads` that is the first words of `name`, or nothing."""
    return max((h for h in heads if name == h or name.startswith(f"{h}_")), key=len, default="")


@contextmanager
def recorded() -> Iterator[set[str]]:
    """Collect the registry names of all reducers that are built meanwhile."""
    names: set[str] = set()
    original = Reducer.__init__

    def init(self: Reducer, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if self.name:
            names.add(self.name)

    Reducer.__init__ = init  # type: ignore[method-assign]
    try:
        yield names
    finally:
        Reducer.__init__ = original  # type: ignore[method-assign]


def find(folder: Path) -> list[Path]:
    """Fixture files of a folder.

    Raises:
        SystemExit: If there are none.
    """
    files = sorted(folder.glob("*.json"))
    if not files:
        raise SystemExit(f"error: expected fixture JSON files in {folder}, found none")
    return files


def main(folder: Path, write: Path | None = None) -> int:
    """Print one line per case and return the exit status.

    Args:
        folder: Fixtures.
        write: File for the result by fixture, which the catalogue reads; None writes none.
    """
    torch.set_num_threads(1)
    counts = {"PASS": 0, "FAIL": 0, "UNSUPPORTED": 0}
    entries: dict[str, dict[str, Any]] = {}
    for path in find(folder):
        with recorded() as built:
            cases = run_fixture(path)
        for case in cases:
            print(case.line(), flush=True)
            counts[case.status] += 1
        entries[path.stem] = {
            "status": "PASS" if all(c.status == "PASS" for c in cases) else "FAIL",
            "cases": len(cases),
            "comparisons": sum(c.checked for c in cases),
            "methods": methods_of(path.stem, built),
        }
    print(", ".join(f"{n} {status}" for status, n in counts.items()))
    if write is not None:
        text = json.dumps({"fixtures": entries}, indent=1, sort_keys=True)
        write.parent.mkdir(parents=True, exist_ok=True)
        write.write_text(f"{text}\n", encoding="utf-8")
        print(f"wrote {write}")
    return 0 if counts["FAIL"] == counts["UNSUPPORTED"] == 0 else 1
