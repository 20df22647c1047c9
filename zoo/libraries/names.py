"""Names of backbones of other libraries: `hf:facebook/dinov2-small`, `open_clip:ViT-B-32`.

Nothing here imports torch or any of the libraries; errors, which do, come along when one is raised.
"""

from __future__ import annotations

import functools
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

#: Facts about well-known models of Hugging Face, so that they can be built without a network.
FILE = Path(__file__).parents[1] / "assets" / "hf_configs.json"


class Library(NamedTuple):
    """A library that backbones come from.

    Attributes:
        name: As recipes name it, which is the name of its package in Python.
        prefix: What names of its models begin with here, and the value of `backbone=`.
        extra: The extra of this package that brings it; None for what is always there.
        title: Its name in words.
        example: A model of it.
    """

    name: str
    prefix: str
    extra: str | None
    title: str
    example: str


LIBRARIES = {
    library.prefix: library
    for library in (
        Library(
            "transformers",
            "hf",
            "transformers",
            "Hugging Face transformers",
            "facebook/dinov2-small",
        ),
        Library("open_clip", "open_clip", "open-clip", "OpenCLIP", "ViT-B-32"),
        Library("torchvision", "torchvision", None, "torchvision", "vit_b_16"),
    )
}
#: Other words for them.
_WORDS = {"transformers": "hf", "huggingface": "hf", "openclip": "open_clip"}
TORCHVISION = ("vit_b_16", "vit_b_32", "vit_h_14", "vit_l_16", "vit_l_32")


def split(name: str) -> tuple[Library | None, str]:
    """A name as library and name within it; without a prefix it is one of timm, and None.

    Raises:
        UnknownName: There is no such library.
        ZooError: Nothing stands behind the prefix.
    """
    from zoo.errors import UnknownName, ZooError

    prefix, colon, rest = name.partition(":")
    if not colon:
        return None, name
    word = prefix.lower().replace("-", "_")
    if word == "timm":
        return None, rest
    library = LIBRARIES.get(_WORDS.get(word, word))
    if library is None:
        raise UnknownName("library of backbones", prefix, [*LIBRARIES, "timm"])
    if not rest:
        raise ZooError(
            f"{name!r} names no model of {library.title}; expected for example "
            f"{library.prefix}:{library.example}"
        )
    return library, rest


def by_package(package: str) -> Library:
    """The library that a recipe names.

    Raises:
        UnknownName: There is no such library.
    """
    from zoo.errors import UnknownName

    for library in LIBRARIES.values():
        if package in (library.name, library.prefix):
            return library
    raise UnknownName("library of backbones", package, [x.name for x in LIBRARIES.values()])


def installed(library: Library) -> bool:
    """Whether a library is there to be imported."""
    return importlib.util.find_spec(library.name) is not None


def need(library: Library) -> None:
    """Refuse to go on without a library.

    Raises:
        ZooError: It is not installed.
    """
    from zoo.errors import ZooError

    if not installed(library):
        raise ZooError(
            f"models of {library.title} need the package {library.name}, which is not installed: "
            f"pip install 'tokenzoo[{library.extra}]'"
        )


@functools.cache
def hf_configs() -> dict[str, dict[str, Any]]:
    """What is stored of Hugging Face's models, by name: class, configuration, preprocessing."""
    stored = json.loads(FILE.read_text(encoding="utf-8"))
    found: dict[str, dict[str, Any]] = {}
    for family in stored["families"]:
        data = stored["data"][family["data"]]
        for name, own in family["models"].items():
            found[name] = {
                "class": family["class"],
                "config": {**family["config"], **own},
                "data": data,
            }
    return found


def known(library: Library) -> list[str]:
    """Names of the models of a library that are known without a network, sorted."""
    return list(_LISTS[library.prefix]())


@functools.cache
def open_clip_trunks() -> dict[str, str | None]:
    """open_clip's own configurations whose image tower is no ResNet, without importing it.

    Each with the model of timm that its tower is, None for open_clip's own; empty without
    open_clip.
    """
    spec = importlib.util.find_spec("open_clip")
    folders = spec.submodule_search_locations if spec is not None else None
    found: dict[str, str | None] = {}
    for folder in folders or ():
        for path in sorted(Path(folder, "model_configs").glob("*.json")):
            config = json.loads(path.read_text(encoding="utf-8"))
            if not why_no_tower(config):
                found[path.stem] = config["vision_cfg"].get("timm_model_name")
    return found


def why_no_tower(config: dict[str, Any]) -> str:
    """Why an image tower of open_clip has no tokens to reduce; empty if it may have."""
    vision = config.get("vision_cfg") or {}
    if not vision.get("timm_model_name") and isinstance(vision.get("layers"), list):
        return "its image tower is a ResNet, which has no tokens"
    return ""


_LISTS: dict[str, Callable[[], list[str]]] = {
    "hf": lambda: sorted(hf_configs()),
    "open_clip": lambda: list(open_clip_trunks()),
    "torchvision": lambda: list(TORCHVISION),
}
