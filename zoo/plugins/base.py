"""The interface of a plugin and the registry of plugin names."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

from torch import Tensor, nn

from reduction.base import Card, constructor_arguments
from reduction.schedule import Schedule
from reduction.tokens import Tokens
from zoo.errors import UnknownName, ZooError

_PLUGINS: dict[str, type[Plugin]] = {}
_P = TypeVar("_P", bound=type["Plugin"])


class Plugin(nn.Module):
    """Acts around the blocks while a reducer acts inside them.

    What a plugin remembers within a forward pass is returned and handed back to it as `memory`,
    never stored on itself.

    Attributes:
        name: Registry name, set by `register_plugin`.
        card: Provenance of the method.
        page: Its documentation page is docs/plugins/PAGE.md.
        replaces_head: Whether `head` always answers, so that the backbone's own is never run.
        protected: Keep the tokens that it adds out of every reduction.
    """

    name: ClassVar[str] = ""
    card: ClassVar[Card]
    page: ClassVar[str]
    replaces_head: ClassVar[bool] = False
    protected: bool = False

    def setup(self, backbone: nn.Module, schedule: Schedule | None = None) -> None:
        """Create parameters that depend on the backbone. Called once by the wrapper.

        Must leave parameters alone that exist already and fit.

        Args:
            backbone: The timm model.
            schedule: Of the model, or None without a reducer; a `Target` not solved yet.
        """

    def warm_start(self, backbone: nn.Module) -> None:
        """Copy initial values from the backbone's weights; again when those were loaded later."""

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the plugin's classifier, if it has one."""

    def start(self, t: Tokens) -> tuple[Tokens, Any]:
        """Before the pre-norm, after the position embedding; may add tokens."""
        return t, ()

    def shift(
        self, block: int, schedule: Schedule | None
    ) -> Callable[[Tensor], tuple[Tensor, Tensor]] | None:
        """What to add to the queries and values of a block's attention, or None.

        Args:
            block: Index of the block.
            schedule: The model's, solved; None without a reducer.

        Returns:
            A function of the attention's normalised input `(B, N, C)` that returns what to add to
            queries and values, `(B, N, H d)` each, before they are split into heads.
        """
        return None

    def after(self, block: int, t: Tokens, memory: Any) -> tuple[Tokens, Any]:
        """After each block; may append tokens with origin -1."""
        return t, memory

    def head(self, backbone: nn.Module, t: Tokens, memory: Any) -> Tensor | None:
        """Logits from the final tokens, or None for the backbone's own head."""
        return None

    def added(self, block: int, depth: int) -> int:
        """Reducible tokens that `after` (or, for block -1, `start`) adds."""
        return 0

    def spared(self, block: int, depth: int) -> int:
        """Trailing tokens that the reduction of a block must leave alone."""
        return 0

    def macs(self, backbone: nn.Module) -> int:
        """Multiply-accumulates of the plugin's own products for one image."""
        return 0

    def block_macs(self, block: int, tokens: int, schedule: Schedule | None) -> int:
        """Multiply-accumulates of `shift` in a block whose attention has so many tokens."""
        return 0

    def unused(self, backbone: nn.Module) -> set[str]:
        """Names of the backbone's parameters that no longer have a say."""
        return set()

    def no_weight_decay(self) -> set[str]:
        """Names of the plugin's parameters that optimisers should not decay."""
        return set()

    def config(self) -> dict[str, Any]:
        """Registry name and constructor arguments."""
        return {"name": self.name, **constructor_arguments(self)}


def register_plugin(name: str) -> Any:
    """Class decorator that gives a plugin its registry name."""

    def wrap(cls: _P) -> _P:
        cls.name = name
        _PLUGINS[name] = cls
        return cls

    return wrap


def plugin_class(name: str) -> type[Plugin]:
    """Class of a plugin.

    Raises:
        UnknownName: With the nearest names.
    """
    if name not in list_plugins():
        raise UnknownName("plugin", name, list_plugins())
    return _PLUGINS[name]


def list_plugins() -> list[str]:
    """Registry names of all plugins, sorted."""
    package = importlib.import_module("zoo.plugins")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"zoo.plugins.{module.name}")
    return sorted(_PLUGINS)


def create_plugins(specs: Sequence[str | Mapping[str, Any] | Plugin]) -> list[Plugin]:
    """Build plugins from names, mappings `{"name": ..., **args}` or instances.

    Raises:
        UnknownName: With the nearest names.
        ZooError: If an argument is unknown or has a bad value.
    """
    if isinstance(specs, str | Mapping | Plugin):
        specs = [specs]
    plugins = []
    for spec in specs or ():
        if isinstance(spec, Plugin):
            plugins.append(spec)
            continue
        args = {"name": spec} if isinstance(spec, str) else {str(k): v for k, v in spec.items()}
        name = args.pop("name", None)
        cls = plugin_class(str(name))
        try:
            plugins.append(cls(**args))
        except TypeError as error:
            raise ZooError(f"plugin {name!r}: {str(error).split('__init__() ')[-1]}") from error
    return plugins


def no_plugins() -> list[Plugin]:
    """What `plugin=none` builds."""
    return []
