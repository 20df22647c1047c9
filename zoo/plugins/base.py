"""The interface of a plugin and the registry of plugin names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

from torch import Tensor, nn

from reduction.base import Card
from reduction.config import Configured
from reduction.registry import Registry
from reduction.schedules.base import Schedule
from reduction.tokens import Tokens

_P = TypeVar("_P", bound=type["Plugin"])


class Plugin(Configured, nn.Module):
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

    def setup(self, backbone: Any, schedule: Schedule | None = None) -> None:
        """Create parameters that depend on the backbone. Called once by the wrapper.

        Must leave parameters alone that exist already and fit.

        Args:
            backbone: The timm model.
            schedule: Of the model, or None without a reducer; a `Target` not solved yet.
        """

    def warm_start(self, backbone: Any) -> None:
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

    def head(self, backbone: Any, t: Tokens, memory: Any) -> Tensor | None:
        """Logits from the final tokens, or None for the backbone's own head."""
        return None

    def added(self, block: int, depth: int) -> int:
        """Reducible tokens that `after` (or, for block -1, `start`) adds."""
        return 0

    def spared(self, block: int, depth: int) -> int:
        """Trailing tokens that the reduction of a block must leave alone."""
        return 0

    def macs(self, backbone: Any) -> int:
        """Multiply-accumulates of the plugin's own products for one image."""
        return 0

    def block_macs(self, block: int, tokens: int, schedule: Schedule | None) -> int:
        """Multiply-accumulates of `shift` in a block whose attention has so many tokens."""
        return 0

    def unused(self, backbone: Any) -> set[str]:
        """Names of the backbone's parameters that no longer have a say."""
        return set()

    def no_weight_decay(self) -> set[str]:
        """Names of the plugin's parameters that optimisers should not decay."""
        return set()


PLUGINS: Registry[Plugin] = Registry("plugin", Plugin, "zoo.plugins", "{'name': 'clca'}")


def register_plugin(name: str) -> Callable[[_P], _P]:
    """Class decorator that gives a plugin its registry name.

    Raises:
        ValueError: If the name is malformed or taken, or the class has no `card`.
    """
    return PLUGINS.named(name)


def plugin_class(name: str) -> type[Plugin]:
    """Class of a plugin.

    Raises:
        UnknownName: With the nearest names.
    """
    return PLUGINS.get(name)


def list_plugins() -> list[str]:
    """Registry names of all plugins, sorted."""
    return PLUGINS.names()


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
        parsed = PLUGINS.parse(spec)
        plugins.append(parsed if isinstance(parsed, Plugin) else PLUGINS.build(*parsed))
    return plugins


def no_plugins() -> list[Plugin]:
    """What `plugin=none` builds."""
    return []
