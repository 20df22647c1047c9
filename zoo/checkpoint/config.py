"""The recipe file of a model folder, ``config.json``: written, read and checked here.

It holds registry names and plain values only, never import paths: a file from somewhere else can
choose among the methods that are installed and can do nothing more.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zoo.errors import BadCheckpoint, ZooError
from zoo.version import __version__

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
    "backbone": frozenset({"name", "tag", "num_classes", "args"}),
    "weights": frozenset({"model", "sha256", "reducer", "reducer_sha256"}),
}
# Arguments of timm.create_model that make it fetch or open something; a recipe may not carry them.
_FORBIDDEN_ARGS = frozenset(
    {"pretrained", "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"}
)
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


def plain(value: Any, where: str) -> Any:
    """Return a value as JSON holds it (tuples become lists).

    Raises:
        ZooError: something in it has no JSON form, such as a class or a function.
    """
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, Mapping):
        return {str(k): plain(v, f"{where}.{k}") for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v, f"{where}[{i}]") for i, v in enumerate(value)]
    raise ZooError(
        f"cannot save {where}={value!r}: config.json holds plain values only; expected a "
        f"number, text, list or mapping, got {type(value).__name__} (timm takes layers by name, "
        "e.g. 'layernorm')"
    )


def dump(value: Any, path: Path) -> None:
    """Write JSON with a final newline."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        BadCheckpoint: missing or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BadCheckpoint(f"{path}: no such file") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BadCheckpoint(
            f"{path}: not valid JSON ({error}); it was cut short or edited"
        ) from error


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


def _schedule_of(value: Any, path: Path) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        raise BadCheckpoint(f"{path}: expected a mapping with a schedule's 'name'")
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
        raise BadCheckpoint(f"{where}: expected 'format' to be a whole number from 1, got {fmt!r}")
    writer = config.get("zoo", "an unknown version")
    if fmt > FORMAT:
        raise BadCheckpoint(
            f"{where}: written in format {fmt} by tokenzoo {writer}, this version reads up to "
            f"format {FORMAT}; update with `pip install -U tokenzoo`"
        )
    backbone = config.get("backbone")
    if not isinstance(backbone, Mapping) or not isinstance(backbone.get("name"), str):
        raise BadCheckpoint(f"{where}: 'backbone' must be a mapping with a 'name'")
    unknown = [k for k in config if k not in _KNOWN[""]]
    unknown += [f"backbone.{k}" for k in backbone if k not in _KNOWN["backbone"]]
    weights = config.get("weights") or {}
    if not isinstance(weights, Mapping):
        raise BadCheckpoint(f"{where}: 'weights' must be a mapping, got {weights!r}")
    unknown += [f"weights.{k}" for k in weights if k not in _KNOWN["weights"]]
    if unknown:
        warnings.warn(
            f"{where}: ignoring unknown keys {', '.join(sorted(unknown))} (written by tokenzoo "
            f"{writer}, this is {zoo_version()})",
            UserWarning,
            stacklevel=2,
        )
    args = backbone.get("args") or {}
    forbidden = sorted(_FORBIDDEN_ARGS & set(args))
    if forbidden or any(c in backbone["name"] for c in ":/\\"):
        raise BadCheckpoint(
            f"{where}: refused, the backbone asks to load from elsewhere "
            f"({', '.join(forbidden) or backbone['name']}); expected a timm model name and "
            "plain arguments"
        )
    for part in ("reducer", "schedule", "data"):
        value = config.get(part)
        if value is not None and not isinstance(value, Mapping):
            raise BadCheckpoint(f"{where}: '{part}' must be null or a mapping, got {value!r}")
        if value and part != "data" and not isinstance(value.get("name"), str):
            raise BadCheckpoint(
                f"{where}: '{part}' needs the 'name' of a registered one, got {value!r}"
            )
    # A fixed name on purpose: a recipe must not point at files outside its folder.
    if (config.get("schedule") or {}).get("file") not in (None, SCHEDULE):
        raise BadCheckpoint(
            f"{where}: schedule.file must be {SCHEDULE!r}, got {config['schedule']['file']!r}"
        )
    plugins = config.get("plugins") or []
    if not isinstance(plugins, list) or not all(
        isinstance(p, Mapping) and isinstance(p.get("name"), str) for p in plugins
    ):
        raise BadCheckpoint(f"{where}: 'plugins' must be a list of mappings with a 'name'")
    for key, name in (("model", MODEL), ("reducer", REDUCER)):
        if weights.get(key) not in (None, name):
            raise BadCheckpoint(f"{where}: weights.{key} must be {name!r} or null")
    return {
        "format": fmt,
        "zoo": writer,
        "backbone": {
            "name": backbone["name"],
            "tag": backbone.get("tag"),
            "num_classes": backbone.get("num_classes"),
            "args": dict(args),
        },
        "reducer": dict(config["reducer"]) if config.get("reducer") else None,
        "schedule": dict(config["schedule"]) if config.get("schedule") else None,
        "plugins": [dict(p) for p in plugins],
        "data": dict(config.get("data") or {}),
        "weights": {k: weights.get(k) for k in sorted(_KNOWN["weights"])},
        "written_by": dict(config.get("written_by") or {}),
    }
