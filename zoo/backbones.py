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
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from zoo.adapters.reasons import REASONS, SUPPORTED
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
    return attempt(name)[1]


def attempt(name: str) -> tuple[str, str]:
    """The class of a model, and why it cannot be wrapped or does not run then, or nothing."""
    import torch

    kind = ""
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            backbone = _built(name)
            kind = type(backbone).__name__
            with torch.device("meta"):
                _try(backbone)
    except Exception as error:
        return kind, f"{type(error).__name__}: {error}".partition("; supported are")[0]
    return kind, ""


def _built(name: str) -> Any:
    """A model on the meta device."""
    import timm

    from zoo.adapters.hollow import hollow

    with hollow():
        return timm.create_model(name).to("meta")


def _try(backbone: Any) -> None:
    """Wrap a model without data with a reducer, run it, and count it twice.

    Raises:
        ZooError: If the tokens are not those that were planned, or the counts differ.
    """
    import torch

    from zoo.adapters.standalone import as_standalone
    from zoo.build import wrap
    from zoo.cost.counters import torch_gmacs
    from zoo.cost.profile import profile
    from zoo.errors import ZooError

    alone = as_standalone(backbone) is not None
    model = wrap(backbone, *((None,) if alone else ("tome", _SCHEDULE))).eval()
    images = torch.empty(1, *model.tower.input_size(backbone))
    ours = profile(model)
    if alone:
        model(images)
        return
    _, info = model(images, return_info=True)
    if list(info.tokens) != ours.tokens:
        raise ZooError(f"expected tokens {ours.tokens}, got {list(info.tokens)}")
    counted = torch_gmacs(wrap(backbone, "random", _SCHEDULE).eval(), images)
    ours = profile(wrap(backbone, "random", _SCHEDULE))
    # timm 1.0.20 multiplies positions by frequencies as matrices, which torch counts.
    if abs(counted - ours.gmacs) > 1e-3 * counted:
        raise ZooError(f"expected {counted} GMACs as torch counts them, got {ours.gmacs}")


_SCHEDULE = {"name": "keep_rate", "rate": 0.75}


def candidates() -> list[str]:
    """Names of the models that may work: of timm's plain vision transformers, and of others."""
    return sorted(n for n in _registered() if _family(n) in SUPPORTED or not _of_timm(n))


def transformers() -> dict[str, list[str]]:
    """Names of timm's vision transformers by the file they are in, plain ones or not."""
    found: dict[str, list[str]] = {}
    for name in sorted(filter(_of_timm, _registered())):
        if _family(name) in (*SUPPORTED, *REASONS):
            found.setdefault(_family(name), []).append(name)
    return found


def _of_timm(name: str) -> bool:
    import timm

    return str(timm.model_entrypoint(name).__module__).startswith("timm.")


def _family(name: str) -> str:
    import timm

    return str(timm.model_entrypoint(name).__module__).rpartition(".")[2]


def stored(works_of_timm: Iterable[str]) -> str:
    """The text of `FILE`; models that are not timm's own are tried here.

    Args:
        works_of_timm: Names of timm's models that can be wrapped.
    """
    registered = sorted(_registered())
    good = {*works_of_timm, *(n for n in registered if not _of_timm(n) and not problem(n))}
    text = {
        "timm": metadata.version("timm"),
        "works": sorted(good),
        "refused": sorted(set(registered) - good),
    }
    return json.dumps(text, indent=0) + "\n"
