"""Parts that compose with any reducer: they add tokens, remember features, or bring a head."""

from zoo.plugins.base import Plugin, create_plugins, no_plugins

__all__ = ["Plugin", "create_plugins", "no_plugins"]
