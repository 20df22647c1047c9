"""Names of the backbones, without importing timm where the answer is known.

`assets/backbones.json` holds every model name of one version of timm and whether a wrapper runs it,
each tried on the meta device; `python -m zoo.cli.docs` writes it. With another version of timm the
names that it does not know are tried when they are asked for.
"""

from __future__ import annotations

import fnmatch
import functools
import json
import sys
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from zoo.libraries.names import LIBRARIES, installed, open_clip_trunks
from zoo.libraries.names import known as known_names

FILE = Path(__file__).parent / "assets" / "backbones.json"


class Known(NamedTuple):
    """What was tried.

    Attributes:
        timm: Version of timm.
        works: Names of models that can be wrapped, sorted.
        refused: Names of all others.
    """

    timm: str
    works: tuple[str, ...]
    refused: tuple[str, ...]


@functools.lru_cache(maxsize=1)
def known() -> Known:
    """What is stored."""
    found = json.loads(FILE.read_text(encoding="utf-8"))
    return Known(found["timm"], tuple(found["works"]), tuple(found["refused"]))


def works(pattern: str = "*") -> list[str]:
    """Names of the backbones that can be wrapped.

    Args:
        pattern: Shell pattern such as `"deit*"`.
    """
    names = known().works if _current() else _works_here()
    return sorted(fnmatch.filter(names, pattern))


def elsewhere(pattern: str = "*") -> list[str]:
    """Names, behind the prefix of their library, of backbones that are not timm's; by library.

    Of the libraries that are installed, and as far as their names are known without a network.

    Args:
        pattern: Shell pattern, for the name with its prefix or without.
    """
    found = []
    for library in LIBRARIES.values():
        names = known_names(library) if installed(library) else []
        for name in names:
            full = f"{library.prefix}:{name}"
            fits = fnmatch.fnmatch(full, pattern) or fnmatch.fnmatch(name, pattern)
            if fits and not (library.name == "open_clip" and _refused_trunk(name)):
                found.append(full)
    return found


def _refused_trunk(name: str) -> bool:
    """Whether the tower of an open_clip model is one of timm that cannot be reduced."""
    trunk = (open_clip_trunks().get(name) or "").partition(".")[0]
    return trunk in known().refused


def exists(name: str) -> bool:
    """Whether timm, or this package, has a model of that name, wrapped or not.

    Args:
        name: With or without a tag of pretrained weights behind a dot.
    """
    stem = name.partition(".")[0]
    if stem in known().works or (_current() and stem in known().refused):
        return True
    return not _current() and stem in _registered()


def _current() -> bool:
    """Whether what is stored is all there is: timm's version, and nobody has added a model."""
    if "timm" in sys.modules:
        return set(_registered()) <= {*known().works, *known().refused}
    return metadata.version("timm") == known().timm


def _registered() -> list[str]:
    import timm

    import zoo.models  # noqa: F401  (registers this package's own architectures with timm)

    return list(timm.list_models())


def _works_here() -> list[str]:
    registered, stored = _registered(), known()
    fresh = set(candidates()) - {*stored.works, *stored.refused}
    return [*set(registered).intersection(stored.works), *(n for n in fresh if not problem(n))]


@functools.cache
def problem(name: str) -> str:
    """Why a model cannot be wrapped, or does not run then; empty if it does."""
    import timm
    import torch

    from zoo.build import wrap
    from zoo.cost.profile import profile

    try:
        with warnings.catch_warnings(), torch.device("meta"), torch.no_grad():
            warnings.simplefilter("ignore")
            backbone: Any = timm.create_model(name)
            model = wrap(backbone, None).eval()
            embed = backbone.patch_embed
            profile(model)
            model(torch.empty(1, embed.proj.in_channels, *embed.img_size))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def candidates() -> list[str]:
    """Names of the models that may work: timm's modules that know a class which can be wrapped."""
    import timm
    from timm.models.eva import Eva
    from timm.models.vision_transformer import VisionTransformer

    modules = {timm.model_entrypoint(name).__module__ for name in _registered()}
    wanted = {
        m
        for m in modules
        if not m.startswith("timm.")
        or {Eva, VisionTransformer} & {v for v in vars(sys.modules[m]).values() if type(v) is type}
    }
    return sorted(n for n in _registered() if timm.model_entrypoint(n).__module__ in wanted)


def tried() -> str:
    """The text of `FILE`, found by trying every model that may work: minutes."""
    registered = sorted(_registered())
    good = [name for name in candidates() if not problem(name)]
    stored = {
        "timm": metadata.version("timm"),
        "works": good,
        "refused": sorted(set(registered) - set(good)),
    }
    return json.dumps(stored, indent=0) + "\n"
