"""What differs between releases of Hydra.

Until 1.3 Hydra has to be told whose defaults hold; from 1.4 on that is deprecated. From 1.4 on it
also asks whoever builds what a configuration names which targets those may be. Here they are
whatever the person at the command line composes, so that no list is given: Hydra then refuses the
worst of them, such as `os.system`, as late releases of 1.3 do, and warns on every call. What comes
out of files from elsewhere is checked where they are read (`zoo.run.resume`).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import hydra.utils
from hydra.errors import InstantiationException

#: For `hydra.main` and `hydra.initialize`: the defaults that the configuration tree is written for.
BASE: Mapping[str, Any] = (
    {} if hasattr(hydra.utils, "execution_whitelist") else {"version_base": "1.3"}
)


def build(node: Any, **arguments: Any) -> Any:
    """Call a node's `_target_`, as `hydra.utils.instantiate` does.

    Args:
        node: Of a configuration that the command composed.
        **arguments: In place of the node's.

    Raises:
        InstantiationException: It cannot be called.
    """
    with warnings.catch_warnings():
        hush()
        try:
            return hydra.utils.instantiate(node, **arguments)
        except InstantiationException:
            raise
        except Exception as error:  # of the constructor, which 1.3 wraps and 1.4 hands on
            raise InstantiationException(str(error)) from error


def hush() -> None:
    """Leave out what Hydra 1.4 says to authors of programs, whenever a `_target_` is called."""
    warnings.filterwarnings("ignore", message=r"hydra\.utils\.instantiate\(\) resolved _target_")


def targets(node: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Every `_target_` inside a configuration: the name of the option that holds it, and its value.

    Args:
        node: A part of it, as plain values.
        name: Of that part.
    """
    if isinstance(node, Mapping):
        if "_target_" in node:
            yield name, str(node["_target_"])
        for key, value in node.items():
            yield from targets(value, f"{name}.{key}" if name else str(key))
    elif isinstance(node, list | tuple):
        for place, value in enumerate(node):
            yield from targets(value, f"{name}.{place}")
