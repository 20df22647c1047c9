"""Where the adapters of a class are: in a file of this folder that bears the name of its library.

`timm_vit.py` adapts classes of timm, `open_clip_vit.py` those of open_clip. A file is imported when
the first object of its library is asked for, so none needs a library that is not installed, and no
list has to be edited.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil


def load_families(cls: type) -> None:
    """Import the adapters of every library that a class, or one of its bases, comes from.

    Args:
        cls: Class of a backbone, a block or an attention module.
    """
    libraries = {base.__module__.partition(".")[0] for base in cls.__mro__}
    # Architectures of our own are models of timm: built of its parts, and in its registry.
    _load(frozenset(libraries | {"timm"} if "zoo" in libraries else libraries))


@functools.cache
def _load(libraries: frozenset[str]) -> None:
    folder = importlib.import_module("zoo.adapters")
    for module in pkgutil.iter_modules(folder.__path__):
        if any(module.name.startswith(f"{library}_") for library in libraries):
            importlib.import_module(f"zoo.adapters.{module.name}")
