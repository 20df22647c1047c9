"""Parts that compose with any reducer: they add tokens, remember features, or bring a head."""

from zoo.plugins.base import Plugin, create_plugins, list_plugins, no_plugins, plugin_class

__all__ = ["Plugin", "create_plugins", "list_plugins", "no_plugins", "plugin_class"]
