"""Facts about parts that come along, stored so that listing them needs no torch.

`zoo list` answers at once: what it says is in a file of `assets/`, written by `python -m
zoo.cli.docs`. Parts that somebody registers, or puts beside the others as a file, are asked
themselves.
"""

from __future__ import annotations

import fnmatch
import functools
import importlib.util
import json
import pkgutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ASSETS = Path(__file__).parents[1] / "assets"


class Stored:
    """The facts about one kind of part.

    Args:
        kind: The folder of `reduction/` that holds the parts; also the name of the file.
        registry: Where their registry is, as "module:NAME".
        describe: Asks one part for its facts.
    """

    def __init__(self, kind: str, registry: str, describe: Callable[[str], dict[str, Any]]) -> None:
        self.kind, self.registry, self.describe = kind, registry, describe
        self.file = ASSETS / f"{kind}.json"

    def entries(self) -> dict[str, dict[str, Any]]:
        """What is known of every part, by name, sorted."""
        stored = self._read
        # A file may have come or gone since.
        found = dict(stored[self.kind]) if self._modules() == stored["modules"] else {}
        if self.registry.partition(":")[0] in sys.modules or not found:
            registry = pkgutil.resolve_name(self.registry)
            known = registry.classes if found else registry.load()
            found.update({name: self.describe(name) for name in known if name not in found})
        return dict(sorted(found.items()))

    def matching(self, pattern: str) -> list[str]:
        """Names that match a shell pattern, or hold it as a part; none if there are none."""
        names = list(self.entries())
        return fnmatch.filter(names, pattern) or [name for name in names if pattern in name]

    def text(self) -> str:
        """What the file should hold."""
        known = sorted(pkgutil.resolve_name(self.registry).load().items())
        ours = [name for name, cls in known if cls.__module__.startswith("reduction.")]
        facts = {name: self.describe(name) for name in ours}
        about = {"modules": self._modules(), self.kind: facts}
        return json.dumps(about, indent=1, ensure_ascii=False) + "\n"

    @functools.cached_property
    def _read(self) -> dict[str, Any]:
        if not self.file.is_file():
            return {"modules": None, self.kind: {}}
        found: dict[str, Any] = json.loads(self.file.read_text(encoding="utf-8"))
        return found

    def _modules(self) -> list[str]:
        """Files of parts. The package is looked up, not imported: it would bring torch along."""
        spec = importlib.util.find_spec("reduction")
        folders = spec.submodule_search_locations if spec is not None else None
        return sorted(
            p.stem for folder in folders or () for p in Path(folder, self.kind).glob("*.py")
        )
