"""Models on disk: saved as a folder with a recipe, loaded without running foreign code.

A model folder holds ``config.json`` (backbone, reducer, schedule, plugins, preprocessing; registry
names, never import paths), ``model.safetensors`` under timm's own key names, and where needed
``reducer.safetensors``, ``schedule.json`` and ``metrics.json``; ``README.md`` is the model card.
"""

from zoo.checkpoint.config import FORMAT, read_config
from zoo.checkpoint.files import file_sha256
from zoo.checkpoint.folder import save_pretrained
from zoo.checkpoint.loading import KEEP, find, list_assets, load, weights_sha256
from zoo.checkpoint.weights import load_weights

__all__ = [
    "FORMAT",
    "KEEP",
    "file_sha256",
    "find",
    "list_assets",
    "load",
    "load_weights",
    "read_config",
    "save_pretrained",
    "weights_sha256",
]
