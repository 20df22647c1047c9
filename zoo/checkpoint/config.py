"""The recipe file of a model folder, ``config.json``: written, read and checked here.

It holds registry names and plain values only, never import paths: a file from somewhere else can
choose among the methods that are installed and can do nothing more.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from zoo.build import CONSUMED_ARGS
from zoo.checkpoint.untrusted import check_plain, read_json, short
from zoo.errors import BadCheckpoint, ZooError
from zoo.libraries.names import LIBRARIES
from zoo.version import __version__

__all__ = [
    "CARD",
    "CONFIG",
    "DATA_KEYS",
    "FORMAT",
    "METRICS",
    "MODEL",
    "OWN_FILES",
    "REDUCER",
    "SCHEDULE",
    "check_config",
    "dump",
    "plain",
    "read_config",
    "read_json",
    "recipe_of_run",
    "versions",
    "zoo_version",
]

FORMAT = 1
CONFIG = "config.json"
MODEL = "model.safetensors"
REDUCER = "reducer.safetensors"
SCHEDULE = "schedule.json"
METRICS = "metrics.json"
CARD = "README.md"
# Everything a model folder may consist of; other files in it belong to somebody else.
OWN_FILES = (CONFIG, MODEL, REDUCER, SCHEDULE, METRICS, CARD)

_KNOWN: dict[str, frozenset[str]] = {
    "": frozenset(
        {
            "format",
            "zoo",
            "backbone",
            "reducer",
            "schedule",
            "plugins",
            "data",
            "weights",
            "written_by",
        }
    ),
    "backbone": frozenset({"library", "name", "tag", "num_classes", "args"}),
    "weights": frozenset({"model", "sha256", "reducer", "reducer_sha256"}),
}
# Budgets in time are solved by measuring, for as long as the recipe likes.
_MEASURED = ("target_ms", "target_speedup")
# Numbers beyond these are in no model, and building with them takes for ever.
_MOST, _MOST_BLOCKS = 1 << 24, 512
_BLOCKS = ("depth", "layers")  # what the number of blocks is called
_LIBRARIES = tuple(library.name for library in LIBRARIES.values())
_REPOSITORY = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
# What timm reads of a model's preprocessing.
DATA_KEYS = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")


def versions() -> dict[str, str]:
    """Return the versions of the libraries that write a folder."""
    import timm
    import torch

    return {"torch": str(torch.__version__), "timm": timm.__version__}


def zoo_version() -> str:
    """Return this library's version."""
    return __version__


def plain(value: Any, where: str, rows: bool = False) -> Any:
    """Return a value as JSON holds it (tuples become lists).

    Args:
        value: What to store.
        where: For the message.
        rows: These are measurements, in which a number that is not finite becomes null.

    Raises:
        ZooError: something in it has no JSON form, such as a class, a function or NaN.
    """
    if isinstance(value, float) and not math.isfinite(value):
        if rows:
            return None
        raise ZooError(f"cannot save {where}={value}: a recipe holds finite numbers")
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, Mapping):
        return {str(k): plain(v, f"{where}.{k}", rows) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v, f"{where}[{i}]", rows) for i, v in enumerate(value)]
    raise ZooError(
        f"cannot save {where}={value!r}: config.json holds plain values only; expected a "
        f"number, text, list or mapping, got {type(value).__name__} (timm takes layers by name, "
        "e.g. 'layernorm')"
    )


def dump(value: Any, path: Path) -> None:
    """Write JSON with a final newline."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_config(folder: str | Path) -> dict[str, Any]:
    """Read and check the ``config.json`` of a model folder.

    Unknown keys are dropped with a warning that names them and the version that wrote them.

    Raises:
        BadCheckpoint: missing, malformed, or of a newer format.
    """
    folder = Path(folder)
    path = folder / CONFIG
    if not path.is_file():
        raise BadCheckpoint(
            f"{folder}: not a model folder, it has no {CONFIG}; "
            "expected one written by save_pretrained"
        )
    config = check_config(read_json(path), path)
    if (config["schedule"] or {}).get("file"):
        config["schedule"] = _schedule_of(read_json(folder / SCHEDULE), folder / SCHEDULE)
    return config


def recipe_of_run(loaded: Any) -> Mapping[str, Any] | None:
    """The recipe that `train.py` stores in a Lightning checkpoint; None in files of others.

    Args:
        loaded: Content of the file.

    Raises:
        BadCheckpoint: it is too large or holds other than plain values.
    """
    hyper = loaded.get("hyper_parameters") if isinstance(loaded, Mapping) else None
    recipe = hyper.get("recipe") if isinstance(hyper, Mapping) else None
    if not isinstance(hyper, Mapping) or not isinstance(recipe, Mapping):
        return None
    if not isinstance(recipe.get("backbone"), Mapping):
        return None  # somebody else's word for something else
    data = hyper.get("data")
    if isinstance(data, Mapping) and "data" not in recipe:
        recipe = {**recipe, "data": dict(data)}
    recipe = dict(recipe)
    check_plain(recipe, "recipe")
    return recipe


def _schedule_of(value: Any, path: Path) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        raise BadCheckpoint(f"{path}: expected a mapping with a schedule's 'name'")
    if value.get("file") is not None:
        raise BadCheckpoint(f"{path}: expected the counts, got file={short(value['file'])}")
    _check_schedule(value, path)
    return dict(value)


def check_config(config: Any, where: Path | str) -> dict[str, Any]:
    """Check a recipe from a file and fill in what it leaves out.

    Raises:
        BadCheckpoint: the format is newer than ours, or a part has the wrong shape.
    """
    if not isinstance(config, Mapping):
        raise BadCheckpoint(f"{where}: expected a mapping, got {type(config).__name__}")
    fmt = config.get("format", FORMAT)
    if not isinstance(fmt, int) or isinstance(fmt, bool) or fmt < 1:
        raise BadCheckpoint(
            f"{where}: expected 'format' to be a whole number from 1, got {short(fmt)}"
        )
    writer = _word(config.get("zoo")) or "an unknown version"
    if fmt > FORMAT:
        raise BadCheckpoint(
            f"{where}: written in format {fmt} by tokenzoo {writer}, this version reads up to "
            f"format {FORMAT}; update with `pip install -U tokenzoo`"
        )
    for part in ("reducer", "schedule", "data", "weights", "written_by"):
        value = config.get(part)
        if value is not None and not isinstance(value, Mapping):
            raise BadCheckpoint(f"{where}: '{part}' must be null or a mapping, got {short(value)}")
        named = part in ("reducer", "schedule")
        if value and named and not isinstance(value.get("name"), str):
            raise BadCheckpoint(
                f"{where}: '{part}' needs the 'name' of a registered one, got {short(value)}"
            )
    backbone, weights = _backbone(config.get("backbone"), where), config.get("weights") or {}
    unknown = [k for k in config if k not in _KNOWN[""]]
    unknown += [f"backbone.{k}" for k in config["backbone"] if k not in _KNOWN["backbone"]]
    unknown += [f"weights.{k}" for k in weights if k not in _KNOWN["weights"]]
    if unknown:
        names = short(", ".join(sorted(map(str, unknown))), 200)[1:-1]
        warnings.warn(
            f"{where}: ignoring unknown keys {names} (written by tokenzoo {writer}, this is "
            f"{zoo_version()})",
            UserWarning,
            stacklevel=2,
        )
    _check_schedule(config.get("schedule") or {}, where)
    plugins = config.get("plugins") or []
    if not isinstance(plugins, list | tuple) or not all(
        isinstance(p, Mapping) and isinstance(p.get("name"), str) for p in plugins
    ):
        raise BadCheckpoint(f"{where}: 'plugins' must be a list of mappings with a 'name'")
    for key, name in (("model", MODEL), ("reducer", REDUCER)):
        if weights.get(key) not in (None, name):
            raise BadCheckpoint(f"{where}: weights.{key} must be {name!r} or null")
    for key in ("sha256", "reducer_sha256"):
        if weights.get(key) is not None and not _word(weights[key]):
            raise BadCheckpoint(
                f"{where}: weights.{key} must be a SHA-256, got {short(weights[key])}"
            )
    return {
        "format": fmt,
        "zoo": writer,
        "backbone": backbone,
        "reducer": dict(config["reducer"]) if config.get("reducer") else None,
        "schedule": dict(config["schedule"]) if config.get("schedule") else None,
        "plugins": [dict(p) for p in plugins],
        "data": _data(config.get("data") or {}, where),
        "weights": {k: weights.get(k) for k in sorted(_KNOWN["weights"])},
        "written_by": dict(config.get("written_by") or {}),
    }


def _backbone(value: Any, where: Path | str) -> dict[str, Any]:
    """Check what is to be built, so that building it takes neither long nor other files."""
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        raise BadCheckpoint(f"{where}: 'backbone' must be a mapping with a 'name'")
    name, args, library = value["name"], value.get("args") or {}, value.get("library")
    if library is not None and library not in _LIBRARIES:
        raise BadCheckpoint(
            f"{where}: backbone.library must be one of {', '.join(_LIBRARIES)}, got "
            f"{short(library)}"
        )
    if not isinstance(args, Mapping):
        raise BadCheckpoint(f"{where}: backbone.args must be a mapping, got {short(args)}")
    forbidden = sorted(CONSUMED_ARGS & set(args))
    # Of a repository's name, one slash; nothing is read by it but weights that a tag stands for.
    path = any(c in name for c in ":/\\") if library is None else not _REPOSITORY.fullmatch(name)
    if forbidden or path:
        raise BadCheckpoint(
            f"{where}: refused, the backbone asks to load from elsewhere "
            f"({', '.join(forbidden) or short(name)}); expected the name of a model and "
            "plain arguments"
        )
    classes, tag = value.get("num_classes"), value.get("tag")
    if classes is not None and not _whole(classes, 0, _MOST):
        raise BadCheckpoint(
            f"{where}: backbone.num_classes must be a whole number from 0, got {short(classes)}"
        )
    if tag and not _word(tag):
        raise BadCheckpoint(f"{where}: backbone.tag must be a word, got {short(tag)}")
    for key, number in _numbers(args):
        most = _MOST_BLOCKS if any(word in key for word in _BLOCKS) else _MOST
        if abs(number) > most:
            raise BadCheckpoint(
                f"{where}: backbone.args.{key}={short(number, 24)} is larger than any model's; "
                f"expected at most {most}"
            )
    own = {} if library is None else {"library": library}
    return {**own, "name": name, "tag": tag or None, "num_classes": classes, "args": dict(args)}


def _numbers(args: Mapping[str, Any]) -> Iterator[tuple[str, int | float]]:
    """Every number in arguments that were checked to be plain, with its innermost name."""
    inside: list[tuple[str, Any]] = list(args.items())
    while inside:
        key, item = inside.pop()
        if isinstance(item, Mapping):
            inside += item.items()
        elif isinstance(item, list | tuple):
            inside += [(key, value) for value in item]
        elif isinstance(item, int | float):
            yield short(key)[1:-1], item


def _check_schedule(schedule: Mapping[str, Any], where: Path | str) -> None:
    # A fixed name on purpose: a recipe must not point at files outside its folder.
    if schedule.get("file") not in (None, SCHEDULE):
        raise BadCheckpoint(
            f"{where}: schedule.file must be {SCHEDULE!r}, got {short(schedule['file'])}"
        )
    if schedule.get("name") in _MEASURED:
        raise BadCheckpoint(
            f"{where}: a schedule of {schedule['name']} is measured anew on every machine; "
            "expected the schedule that was found"
        )


def _data(data: Mapping[str, Any], where: Path | str) -> dict[str, Any]:
    """Check the part of the preprocessing that timm and the data read."""

    def numbers(value: Any, low: float) -> bool:
        found = value if isinstance(value, list | tuple) else []
        return bool(found) and all(
            isinstance(v, int | float) and not isinstance(v, bool) and low <= v <= 1e6
            for v in found
        )

    size: Any = data.get("input_size")
    share = data.get("crop_pct")
    right = {
        "input_size": numbers(size, 1) and len(size) == 3 and all(type(v) is int for v in size),
        "mean": numbers(data.get("mean"), -1e6),
        "std": numbers(data.get("std"), 1e-12),
        "interpolation": bool(_word(data.get("interpolation"))),
        "crop_pct": numbers([share], 1e-6),
        "crop_mode": bool(_word(data.get("crop_mode"))),
    }
    for key in DATA_KEYS:
        if data.get(key) is not None and not right[key]:
            raise BadCheckpoint(f"{where}: data.{key} cannot be {short(data[key])}")
    return dict(data)


def _whole(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _word(value: Any) -> str:
    """A value that is one printable word of ASCII, such as a version; empty for all else."""
    return (
        value if isinstance(value, str) and re.fullmatch(r"[\w.+\- ]{1,100}", value, re.A) else ""
    )
