"""TokenZoo: any timm ViT, any published token reducer, any budget.

import zoo
model = zoo.create_model("deit_small_patch16_224", reducer="tome",
schedule={"name": "constant_r", "r": 13})
print(zoo.profile(model))
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from zoo.version import __version__

__all__ = [
    "ReducedViT",
    "__version__",
    "attach",
    "attached",
    "attention_maps",
    "calibrate",
    "create_model",
    "detach",
    "list_methods",
    "list_models",
    "list_selectors",
    "load",
    "profile",
    "selector",
    "visualize",
    "wrap",
]

if TYPE_CHECKING:
    from zoo.api import (
        attach,
        attached,
        attention_maps,
        calibrate,
        create_model,
        detach,
        list_methods,
        list_models,
        list_selectors,
        load,
        profile,
        selector,
        visualize,
        wrap,
    )
    from zoo.model.reduced import ReducedViT


def __getattr__(name: str) -> Any:
    # timm takes seconds to import; `zoo --help` and tab completion must not wait for it.
    if name == "ReducedViT":
        from zoo.model.reduced import ReducedViT

        return ReducedViT
    if name in __all__:
        import zoo.api

        return getattr(zoo.api, name)
    raise AttributeError(f"module 'zoo' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
