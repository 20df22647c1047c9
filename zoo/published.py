"""Published schedules by name: `diffrate/deit_small_2.9` is configs/schedule/diffrate/....yaml."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def config_folder() -> Path:
    """The folder of the configuration tree: installed as zoo.configs, or a checkout's."""
    spec = importlib.util.find_spec("zoo.configs")
    if spec is not None and spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations)))
    return Path(__file__).resolve().parents[1] / "configs"


def list_published() -> list[str]:
    """Names of all published schedules, such as "diffrate/deit_small_2.9"."""
    folder = config_folder() / "schedule"
    found = (path.relative_to(folder).with_suffix("") for path in folder.glob("*/*.yaml"))
    return sorted(path.as_posix() for path in found)


def published(spec: Any) -> Any:
    """Replace the name of a published schedule, alone or in a mapping, by what it stands for.

    Args:
        spec: What a person gave as a schedule. Whatever names no published one is passed on; a
            mapping's other arguments win over those of the file.

    Raises:
        UnknownName: If a name with a slash is none of `list_published`.
    """
    name = spec.get("name") if isinstance(spec, Mapping) else spec
    if not isinstance(name, str) or "/" not in name:
        return spec
    # The command line asks this module for its folder and must not wait for torch.
    from zoo.errors import UnknownName, ZooError

    if name not in list_published():
        raise UnknownName("published schedule", name, list_published())
    from omegaconf import OmegaConf

    path = config_folder() / "schedule" / f"{name}.yaml"
    args: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    args = {key: value for key, value in args.items() if not key.startswith("_")}
    given = dict(spec) if isinstance(spec, Mapping) else {}
    given.pop("name", None)
    if "keep" not in args:
        raise ZooError(f"{path}: expected counts per block under 'keep'")
    return {"name": "per_block", **args, **given}
