"""Finding fixtures, choosing a handler by their method, printing one line per case."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from tests.parity.fixture import Case, Fixture, Unsupported

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


def find(folder: Path) -> list[Path]:
    """Fixture files of a folder.

    Raises:
        SystemExit: If there are none.
    """
    files = sorted(folder.glob("*.json"))
    if not files:
        raise SystemExit(f"error: expected fixture JSON files in {folder}, found none")
    return files


def main(folder: Path) -> int:
    """Print one line per case and return the exit status."""
    torch.set_num_threads(1)
    counts = {"PASS": 0, "FAIL": 0, "UNSUPPORTED": 0}
    for path in find(folder):
        for case in run_fixture(path):
            print(case.line(), flush=True)
            counts[case.status] += 1
    print(", ".join(f"{n} {status}" for status, n in counts.items()))
    return 0 if counts["FAIL"] == counts["UNSUPPORTED"] == 0 else 1
