"""Architectures of this project, registered with timm when this package is imported."""

import importlib
import pkgutil

#: Module names, which is also how timm groups registered models.
MODULES = tuple(sorted(m.name for m in pkgutil.iter_modules(__path__)))

for _name in MODULES:
    importlib.import_module(f"{__name__}.{_name}")
