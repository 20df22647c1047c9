"""Resuming a run: it goes on as it was, and says so of every option that asks for something else.

A checkpoint holds the options of its run, interpolations and all. `resumed` puts them back into
place; what was typed beside `ckpt=` is compared with them, and either has no part in the training,
then it is taken, or is refused by its name.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from zoo.checkpoint.untrusted import check_plain, short
from zoo.errors import BadCheckpoint
from zoo.published import config_folder

if TYPE_CHECKING:
    from zoo.model.reduced import ReducedViT

Key = tuple[str, ...]

# Where things are on this machine: every command says it anew.
_PLACES = ("paths", "output_dir", "results", "ckpt", "hydra")
# What may differ in a resumed run: how long, where and how it runs, what is shown and tested.
_FREE = (
    "trainer.max_*", "trainer.min_*", "trainer.accelerator", "trainer.devices",
    "trainer.num_nodes", "trainer.strategy", "trainer.enable_*", "trainer.log_every_n_steps",
    "trainer.limit_test_batches", "trainer.num_sanity_val_steps", "trainer.default_root_dir",
    "trainer.profiler", "logger", "logger.*", "callbacks.progress*", "callbacks.lr*", "threads",
    "test", "runtime", "runtime.*", "data.root", "data.num_workers", "data.pin_memory",
    "data.eval_batch_size", "data.download", "progress",
)  # fmt: skip
_OURS = ("zoo.", "lightning.", "pytorch_lightning.")
_SHOWN = 4
_ABSENT = object()


def options_to_store(cfg: DictConfig) -> dict[str, Any]:
    """The options of a run as its checkpoints hold them: not resolved, without places."""
    found = OmegaConf.to_container(cfg, resolve=False)
    assert isinstance(found, dict)
    return {str(key): value for key, value in found.items() if key not in _PLACES}


def read_checkpoint(path: Path) -> Mapping[str, Any]:
    """What Lightning wrote.

    Args:
        path: A file.

    Raises:
        BadCheckpoint: It is damaged, or not of a training run.
    """
    from zoo.checkpoint.files import read_any

    stored = read_any(path)
    needed = {"state_dict": dict, "loops": dict, "optimizer_states": list, "epoch": int}
    if not isinstance(stored, Mapping) or any(
        not isinstance(stored.get(key), kind) for key, kind in needed.items()
    ):
        raise BadCheckpoint(
            f"{path}: not a training checkpoint; to start from its weights type weights={path}"
        )
    return stored


def resumed(cfg: DictConfig, stored: Mapping[str, Any], path: Path) -> DictConfig:
    """The configuration of the run that a checkpoint is of.

    Args:
        cfg: What was composed from the command, with `ckpt`.
        stored: Content of the checkpoint.
        path: Its path.

    Raises:
        BadCheckpoint: It holds no options, or the command asks for other ones.
    """
    was = _stored_options(stored, path)
    now: dict[str, Any] = OmegaConf.to_container(cfg, resolve=False)  # type: ignore[assignment]
    result = {**now, **was, "callbacks": _callbacks(was, now)}
    _check_targets(result, now, path)
    before = OmegaConf.create(copy.deepcopy(result))
    differ = []
    for key in sorted(_typed(now)):
        same = _at(now, key) == _at(result, key) or _resolved(cfg, key) == _resolved(before, key)
        if key[0] in _PLACES or same:
            continue
        foreign = key[0] == "callbacks" and _is_foreign(_at(now, key[:2]))
        if foreign or any(fnmatchcase(".".join(key), pattern) for pattern in _FREE):
            _put(result, key, _at(now, key))
        else:
            differ.append(key)
    if differ:
        # What the command sets stands first, then what it thereby leaves out.
        differ.sort(key=lambda key: _at(now, key) is None)
        kinds = list(dict.fromkeys(key[0] for key in differ))
        shown = [
            f"{'.'.join(k)}={_value(cfg, k)} (was {_value(before, k)})" for k in differ[:_SHOWN]
        ]
        more = f" and {len(differ) - _SHOWN} more" if len(differ) > _SHOWN else ""
        raise BadCheckpoint(
            f"{path}: trained with another {_and(kinds)} than this command asks for; leave "
            f"out {', '.join(shown)}{more}, because a resumed run goes on as it was, or start a "
            f"new run from its weights: weights={path}"
        )
    merged = OmegaConf.create(result)
    OmegaConf.set_struct(merged, True)
    return merged


def check_model(path: Path, model: ReducedViT, volatile: frozenset[str]) -> int:
    """Refuses a checkpoint of another model before Lightning fails on it key by key.

    Args:
        path: The checkpoint.
        model: What the command has built.
        volatile: Parts of its recipe that a training may change.

    Returns:
        The number of epochs that it is after.

    Raises:
        BadCheckpoint: It is of another model, e.g. because its weights have changed on disk.
    """
    stored = read_checkpoint(path)
    was = stored["hyper_parameters"].get("recipe") or {}
    check_plain(was, f"{path} (recipe)")
    was, now = (_untagged(as_json(recipe)) for recipe in (was, model.recipe))
    differ = sorted(k for k in {*was, *now} - volatile if was and was.get(k) != now.get(k))
    if differ:
        raise BadCheckpoint(
            f"{path}: trained with another {' and '.join(differ)} than this command asks for; "
            f"repeat the options of that run (was {[was.get(k) for k in differ]})"
        )
    return int(stored["epoch"]) + 1


def as_json(value: Any) -> Any:
    """A copy with lists for tuples."""
    if isinstance(value, Mapping):
        return {str(k): as_json(v) for k, v in value.items()}
    return [as_json(v) for v in value] if isinstance(value, list | tuple) else value


def _stored_options(stored: Mapping[str, Any], path: Path) -> dict[str, Any]:
    hyper = stored.get("hyper_parameters")
    # Before 0.2 they were stored resolved, and without trainer and callbacks: those the command
    # gives.
    found = (hyper.get("options") or hyper.get("config")) if isinstance(hyper, Mapping) else None
    if not isinstance(found, dict) or not found:
        raise BadCheckpoint(
            f"{path}: it does not hold the options of its run, so nothing can go on as it was; "
            f"start a new run from its weights: weights={path}"
        )
    check_plain(found, f"{path} (options)")
    return {str(key): value for key, value in found.items() if key not in _PLACES}


def _check_targets(result: Mapping[str, Any], now: Mapping[str, Any], path: Path) -> None:
    """Refuses a file that would have this command call what neither it nor the zoo names.

    Options with a `_target_` are calls of Python objects; whoever sends a checkpoint chooses them.
    """
    named = {target for _, target in _targets(now)}
    for name, target in _targets(result):
        if target not in named and target not in _packaged():
            raise BadCheckpoint(
                f"{path}: its run called {short(target, 120)} for {name}, which is not part of "
                f"this package; if you trust whoever wrote the file, type "
                f"{name}._target_={short(target, 120)[1:-1]}, too"
            )


def _targets(node: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Every `_target_` inside plain values: the option that holds it, and what it names."""
    inside: Any = node.items() if isinstance(node, Mapping) else ()
    if isinstance(node, Mapping) and "_target_" in node:
        yield name, str(node["_target_"])
    for key, value in enumerate(node) if isinstance(node, list | tuple) else inside:
        yield from _targets(value, f"{name}.{key}" if name else str(key))


@cache
def _packaged() -> frozenset[str]:
    """What the options that come with the package call."""
    texts = (file.read_text(encoding="utf-8") for file in config_folder().rglob("*.yaml"))
    return frozenset(name for text in texts for name in re.findall(r"_target_: *([\w.]+)", text))


def _callbacks(was: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """The run's own callbacks; those of other people's code are this command's."""
    mine = now.get("callbacks") or {}
    if "callbacks" not in was:
        return dict(mine)
    ours = {k: v for k, v in (was["callbacks"] or {}).items() if not _is_foreign(v)}
    return {**ours, **{k: v for k, v in mine.items() if _is_foreign(v)}}


def _is_foreign(node: Any) -> bool:
    target = node.get("_target_") if isinstance(node, Mapping) else None
    return isinstance(target, str) and not target.startswith(_OURS)


def _typed(now: Mapping[str, Any]) -> set[Key]:
    """Names of the options that a command set: what differs from the defaults, and what it names.

    An option that was typed with the value of the default cannot be told from one that was not,
    unless Hydra says what was typed.
    """
    default, mine = dict(_leaves(_defaults())), dict(_leaves(now))
    found = {k for k in {*mine, *default} if mine.get(k, _ABSENT) != default.get(k, _ABSENT)}
    for name in _named():
        found |= {key for key in mine if key[: len(name)] == name}
    return found


def _named() -> list[Key]:
    """Names in the overrides of the running Hydra job, if there is one."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.core.override_parser.overrides_parser import OverridesParser

    if not HydraConfig.initialized():
        return []
    parsed = OverridesParser.create().parse_overrides(list(HydraConfig.get().overrides.task))
    return [tuple(override.key_or_group.split(".")) for override in parsed]


def _defaults() -> Any:
    """configs/train.yaml, composed without any override."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    from zoo.version import hydra_base

    if GlobalHydra.instance().is_initialized():
        composed = compose("train")
    else:
        with initialize_config_dir(str(config_folder()), **hydra_base()):
            composed = compose("train")
    return OmegaConf.to_container(composed, resolve=False)


def _leaves(node: Any, key: Key = ()) -> Iterator[tuple[Key, Any]]:
    if isinstance(node, Mapping) and node:
        for name, value in node.items():
            yield from _leaves(value, (*key, str(name)))
    else:
        yield key, node


def _at(node: Any, key: Key) -> Any:
    for part in key:
        node = node.get(part) if isinstance(node, Mapping) else None
    return node


def _put(node: dict[str, Any], key: Key, value: Any) -> None:
    for part in key[:-1]:
        inner = node.get(part)
        node[part] = dict(inner) if isinstance(inner, Mapping) else {}
        node = node[part]
    node[key[-1]] = value


def _resolved(cfg: DictConfig, key: Key) -> Any:
    node: Any = cfg
    try:
        for part in key:
            node = node[part] if OmegaConf.is_dict(node) and part in node else None
        return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
    except OmegaConfBaseException:
        return _ABSENT  # such as a folder that only Hydra knows


def _and(words: list[str]) -> str:
    return " and ".join([*([", ".join(words[:-1])] if words[1:] else []), *words[-1:]])


def _value(cfg: DictConfig, key: Key) -> str:
    value = _resolved(cfg, key)
    return "null" if value in (None, _ABSENT) else short(value, 60).strip("'")


def _untagged(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe without the tag, which older versions wrote into models from scratch, too."""
    return {**recipe, "backbone": {**recipe["backbone"], "tag": None}} if recipe else recipe
