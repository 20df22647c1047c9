"""The version of the distribution, and what differs between releases of Hydra.

Hydra 1.3 has to be told whose defaults hold, and wraps what a constructor raises; 1.4 deprecates
the former and hands on the latter. It also asks whoever builds what a configuration names which
targets those may be. Here they are whatever the person at the command line composes, so that no
list is given: Hydra then refuses the worst of them, such as `os.system`, as late releases of 1.3
do, and warns on every call. Files from elsewhere are checked where they are read.
"""

from __future__ import annotations

import warnings
from typing import Any

__version__ = "0.1.0"


def hydra_base() -> dict[str, Any]:
    """Arguments of `hydra.main` and `hydra.initialize`: the defaults of the configuration tree."""
    import hydra.utils

    return {} if hasattr(hydra.utils, "execution_whitelist") else {"version_base": "1.3"}


def built(node: Any, **arguments: Any) -> Any:
    """Call a node's `_target_`, as `hydra.utils.instantiate` of Hydra 1.3 does.

    Args:
        node: Of a configuration that the command composed.
        **arguments: In place of the node's.

    Raises:
        InstantiationException: It cannot be called, or raised what is the cause.
    """
    import hydra.utils
    from hydra.errors import InstantiationException

    with warnings.catch_warnings():
        hush()
        try:
            return hydra.utils.instantiate(node, **arguments)
        except InstantiationException:
            raise
        except Exception as error:
            key = next((n for n in getattr(error, "__notes__", ()) if "full_key: " in n), "")
            raise InstantiationException(f"{error}\n{key}") from error


def hush() -> None:
    """Leave out what Hydra 1.4 says to authors of programs, whenever a `_target_` is called."""
    warnings.filterwarnings("ignore", message=r"hydra\.utils\.instantiate\(\) resolved _target_")
