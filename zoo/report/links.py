"""Where a method is explained: its paper, its official code, and its page here.

``links.json`` is written by `python -m zoo.cli.docs` from the cards of methods and plugins, so that
a report needs to import neither.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from zoo.report.words import DENSE, plugins

_ROOT = Path(__file__).resolve().parents[2]


class Links(NamedTuple):
    """What is known about where to read on; empty where there is nothing.

    Attributes:
        title: Of the paper, with authors, venue and year.
        paper: Address of the paper.
        code: Address of the official code.
        page: The method's page in the documentation, from the root of a checkout.
    """

    title: str = ""
    paper: str = ""
    code: str = ""
    page: str = ""

    def seen_from(self, folder: Path) -> Links:
        """The same with the page as a link from a folder; without one where there are no pages."""
        target = _ROOT / self.page
        if not self.page or not target.is_file():
            return self._replace(page="")
        folder = folder.resolve()
        if folder.is_relative_to(_ROOT):  # goes on working wherever the checkout lies
            return self._replace(page=Path(os.path.relpath(target, folder)).as_posix())
        return self._replace(page=target.as_uri())


@functools.lru_cache(maxsize=1)
def known() -> Mapping[str, Links]:
    """Links of every method, plugin and architecture that reduces by itself, by name."""
    text = resources.files("zoo.report").joinpath("links.json").read_text(encoding="utf-8")
    return {name: Links(**found) for name, found in json.loads(text).items()}


def links_of(row: Mapping[str, Any]) -> Links:
    """Where the method of a row is explained; the first plugin's links where there is no method."""
    names = [str(row.get("method") or DENSE), *plugins(row)]
    return next((known()[name] for name in names if name in known()), Links())


def title_of(row: Mapping[str, Any]) -> list[str]:
    """The title of the paper, where there is one."""
    return [title] if (title := links_of(row).title) else []
