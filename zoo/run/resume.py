"""Resuming a run: it goes on as it was, and says so of every option that asks for something else.

A checkpoint holds the options of its run, interpolations and all. `resumed` puts them back into
place; what was typed beside `ckpt=` is compared with them, and either has no part in the training,
then it is taken, or is refused by its name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from zoo.checkpoint.untrusted import check_plain, short
from zoo.errors import BadCheckpoint

# Where things are on this machine: every command says it anew.
_PLACES = ("paths", "output_dir", "results", "ckpt", "hydra")
# What may differ in a resumed run: how long, where and how it runs, what is shown and tested.
_FREE = (
    "trainer.max_*", "trainer.min_*", "trainer.accelerator", "trainer.devices",
    "trainer.num_nodes", "trainer.strategy", "trainer.enable_*", "trainer.log_every_n_steps",
    "trainer.limit_test_batches", "trainer.num_sanity_val_steps", "trainer.default_root_dir",
    "trainer.profiler", "logger", "logger.*", "callbacks.progress*", "callbacks.lr*", "threads",
    "test", "runtime", "runtime.*", "data.root", "data.num_workers", "data.pin_memory",
    "data.eval_batch_size", "data.download",
)  # fmt: skip
_OURS = ("zoo.", "lightning.", "pytorch_lightning.")
_SHOWN = 4


def options_to_store(cfg: DictConfig) -> dict[str, Any]:
    """The options of a run as its checkpoints hold them: not resolved, without places."""
    found = OmegaConf.to_container(cfg, resolve=False)
    assert isinstance(found, dict)
    return {str(key): value for key, value in found.items() if key not in _PLACES}


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
    result = cfg.copy()
    with open_dict(result):
        for key, value in was.items():
            if key != "callbacks":
                result[key] = value
        result.callbacks = _callbacks(was, cfg)
    differ = []
    for key in sorted(_typed(cfg)):
        if key.split(".")[0] in _PLACES or _equal(cfg, result, key):
            continue
        if any(fnmatchcase(key, pattern) for pattern in _FREE) or _foreign(cfg, key):
            OmegaConf.update(result, key, _raw(cfg, key), force_add=True)
        else:
            differ.append(key)
    if differ:
        kinds = list(dict.fromkeys(key.split(".")[0] for key in differ))
        shown = [f"{k}={_value(cfg, k)} (was {_value(result, k)})" for k in differ[:_SHOWN]]
        more = f" and {len(differ) - _SHOWN} more" if len(differ) > _SHOWN else ""
        raise BadCheckpoint(
            f"{path}: trained with another {' and '.join(kinds)} than this command asks for; leave "
            f"out {', '.join(shown)}{more}, because a resumed run goes on as it was, or start a "
            f"new run from its weights: weights={path}"
        )
    return result


def _stored_options(stored: Mapping[str, Any], path: Path) -> dict[str, Any]:
    hyper = stored.get("hyper_parameters")
    # Version 0.1 stored them resolved and without trainer and callbacks, which the command gives.
    found = (hyper.get("options") or hyper.get("config")) if isinstance(hyper, Mapping) else None
    if not isinstance(found, dict) or not found:
        raise BadCheckpoint(
            f"{path}: it does not hold the options of its run, so nothing can go on as it was; "
            f"start a new run from its weights: weights={path}"
        )
    check_plain(found, f"{path} (options)")
    return {str(key): value for key, value in found.items() if key not in _PLACES}


def _callbacks(was: Mapping[str, Any], cfg: DictConfig) -> dict[str, Any]:
    """The run's own callbacks; those of other people's code are this command's."""
    now = _raw(cfg, "callbacks") or {}
    if not isinstance(was.get("callbacks"), dict):
        return dict(now)
    ours = {k: v for k, v in was["callbacks"].items() if not _is_foreign(v)}
    return {**ours, **{k: v for k, v in now.items() if _is_foreign(v)}}


def _is_foreign(node: Any) -> bool:
    target = node.get("_target_") if isinstance(node, Mapping) else None
    return isinstance(target, str) and not target.startswith(_OURS)


def _foreign(cfg: DictConfig, key: str) -> bool:
    parts = key.split(".")
    return parts[0] == "callbacks" and _is_foreign(_raw(cfg, ".".join(parts[:2])))


def _typed(cfg: DictConfig) -> set[str]:
    """Names of the options that a command set: what differs from the defaults, and what it names.

    An option that was typed with the value of the default cannot be told from one that was not,
    unless Hydra says what was typed.
    """
    default = _leaves(_defaults())
    mine = _leaves(OmegaConf.to_container(cfg, resolve=False))
    found = {k for k in {*mine, *default} if mine.get(k, _ABSENT) != default.get(k, _ABSENT)}
    for name in _named():
        found |= {k for k in mine if k == name or k.startswith(f"{name}.")}
    return found


def _named() -> list[str]:
    """Names in the overrides of the running Hydra job, if there is one."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.core.override_parser.overrides_parser import OverridesParser

    if not HydraConfig.initialized():
        return []
    parsed = OverridesParser.create().parse_overrides(list(HydraConfig.get().overrides.task))
    return [override.key_or_group for override in parsed]


def _defaults() -> Any:
    """configs/train.yaml, composed without any override."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    from zoo.run.messages import config_folder

    if GlobalHydra.instance().is_initialized():
        composed = compose("train")
    else:
        with initialize_config_dir(str(config_folder()), version_base="1.3"):
            composed = compose("train")
    return OmegaConf.to_container(composed, resolve=False)


_ABSENT = object()


def _leaves(node: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(node, Mapping) or not node:
        return {prefix.rstrip("."): node} if prefix else {}
    found: dict[str, Any] = {}
    for key, value in node.items():
        found |= _leaves(value, f"{prefix}{key}.")
    return found


def _equal(cfg: DictConfig, other: DictConfig, key: str) -> bool:
    return bool(_raw(cfg, key) == _raw(other, key) or _resolved(cfg, key) == _resolved(other, key))


def _raw(cfg: DictConfig, key: str) -> Any:
    node: Any = OmegaConf.to_container(cfg, resolve=False)
    for part in key.split("."):
        node = node.get(part) if isinstance(node, Mapping) else None
    return node


def _resolved(cfg: DictConfig, key: str) -> Any:
    try:
        node = OmegaConf.select(cfg, key)
        return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
    except OmegaConfBaseException:
        return _raw(cfg, key)


def _value(cfg: DictConfig, key: str) -> str:
    value = _resolved(cfg, key)
    return "null" if value is None else short(value, 60).strip("'")


def epochs_done(stored: Mapping[str, Any]) -> Iterator[int]:
    """The number of epochs that a checkpoint is after, if it says so."""
    if isinstance(stored.get("epoch"), int):
        yield stored["epoch"] + 1
