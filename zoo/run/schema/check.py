"""A configuration against the table of options, and against the constructors that it names."""

from __future__ import annotations

import inspect
import os
import pkgutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from zoo.run.messages import nearest
from zoo.run.schema.kinds import Kind
from zoo.run.schema.options import CALLBACK, LOGGER, OPEN, OPTIONAL, REQUIRED, TABLES, Options
from zoo.run.schema.sense import check_sense

if TYPE_CHECKING:
    from omegaconf import DictConfig

# Groups whose chosen option says what to build; without it they say nothing.
_BUILT = (
    *("reducer", "schedule", "plugin", "selector", "data"),
    *("module", "loss", "optim", "lr_schedule", "trainer"),
)
# Cheap to build, and then their own messages come first.
_PARTS = ("reducer", "schedule", "plugin", "selector")


def check_config(cfg: DictConfig, kind: str, typed: Iterable[str] = ()) -> None:
    """Refuses values of the wrong type or out of range, unknown options, and contradictions.

    Args:
        cfg: The composed configuration.
        kind: "train" or "eval".
        typed: The overrides of the command line.

    Raises:
        ZooError: For the first one; the message says what was expected and what was given.
        OmegaConfBaseException: A value refers to one that does not exist, or is missing.
    """
    from omegaconf import OmegaConf

    plain: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    check_values(plain, TABLES[kind])
    check_sense(plain, kind, list(typed))
    check_targets(plain, kind)


def check_values(values: Mapping[str, Any], table: Options, above: str = "") -> None:
    """Holds nested options against a table.

    Args:
        values: Plain containers.
        table: Of `zoo.run.schema.options`.
        above: Name of the group that they are in.

    Raises:
        ZooError: See `check_config`.
    """
    start = f"{above}." if above else ""
    for name, kind in table.items():
        key = start + name
        if name not in values:
            if key in REQUIRED or above == "throughput":
                raise _error(f"{key} has no value any more; leave out ~{key}, or type {key}=VALUE")
        elif isinstance(kind, Kind):
            _check_value(key, values[name], kind)
        elif values[name] is None:
            if key not in OPTIONAL:
                raise _error(f"{key}=null: expected values for {', '.join(kind)}; leave out {key}")
        elif not isinstance(values[name], Mapping):
            inside = ", ".join(kind)
            raise _error(
                f"{key}={shown(values[name])}: expected {key}.NAME=VALUE, where NAME is {inside}"
            )
        else:
            check_values(values[name], kind, key)
    if above.split(".")[0] in OPEN or above == "backbone.args":
        return
    for name in values:
        if name not in table and not str(name).startswith("_"):
            hint = nearest(str(name), table) or f"there are {', '.join(table)}"
            raise _error(f"no option {start + str(name)!r}; {hint}")


def check_targets(cfg: Mapping[str, Any], kind: str) -> None:
    """Holds what a configuration builds against the annotations of the constructors.

    Raises:
        ZooError: See `check_config`.
    """
    from zoo.run.build import instantiate

    for group in (*_BUILT, *_PARTS, "callbacks", "logger"):
        node = cfg.get(group)
        if node is not None and not isinstance(node, Mapping):
            raise _error(f"{group}={shown(node)}: expected {group}=NAME of one, or null")
    for group in _BUILT:
        node = cfg.get(group)
        if isinstance(node, Mapping) and "_target_" not in node:
            what = f" for {group}.{next(iter(node))}" if node else ""
            raise _error(f"no {group} is chosen{what}; add {group}=NAME")
    for group in _PARTS:
        if cfg.get(group) is not None:
            instantiate(dict(cfg[group]), group)
    for group, table in (("callbacks", CALLBACK), ("logger", LOGGER)):
        for name, node in (cfg.get(group) or {}).items():
            if node is not None and not (isinstance(node, Mapping) and "_target_" in node):
                raise _error(f"{group}.{name}={shown(node)}: expected a _target_ to build, or null")
            check_values(node or {}, table, f"{group}.{name}")
    for key, node in _nodes(cfg):
        # Data that no task looks at are not built, and would bring Lightning along.
        if key.split(".")[0] not in (*_PARTS, *(["data"] if kind == "eval" else [])):
            _check_target(key, node)
    if cfg.get("trainer"):
        _check_devices(cfg["trainer"])


def _check_target(key: str, node: Mapping[str, Any]) -> None:
    from reduction.arguments import argument_hints, fits, words

    build = _constructor(key, str(node["_target_"]))
    base = _base(key)
    if base is not None and not (inspect.isclass(build) and issubclass(build, base)):
        raise _error(f"{key}._target_={node['_target_']}: expected a {base.__name__} of Lightning")
    parameters = inspect.signature(build).parameters
    hints = argument_hints(build)
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for name, value in node.items():
        if name.startswith("_"):
            continue
        if name not in parameters and name not in hints and not takes_all:
            hint = nearest(name, parameters) or f"it takes {', '.join(parameters) or 'nothing'}"
            raise _error(f"no option {f'{key}.{name}'!r}; {hint}")
        if name in hints and not fits(value, hints[name]):
            raise _error(f"{key}.{name}={shown(value)}: expected {words(hints[name])}")
    if takes_all and key == "optim" and isinstance(node.get("opt"), str):
        _check_optimizer(node, parameters)


def _check_optimizer(node: Mapping[str, Any], known: Iterable[str]) -> None:
    """The arguments that are handed on to the optimiser that was chosen by name."""
    from timm.optim import get_optimizer_class, list_optimizers

    from reduction.arguments import check_arguments
    from zoo.errors import UnknownName

    name = str(node["opt"]).lower()
    if name not in list_optimizers():
        raise UnknownName("optimiser", node["opt"], map(str, list_optimizers()))
    more = {k: v for k, v in node.items() if k not in known and not k.startswith("_")}
    build = get_optimizer_class(name, bind_defaults=False)
    parameters = inspect.signature(build).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    for option in more:
        if option not in parameters:
            takes = ", ".join(p for p in parameters if p not in ("params", "kwargs"))
            hint = nearest(option, parameters) or f"{name} takes {takes}"
            raise _error(f"no option {'optim.' + option!r}; {hint}")
    check_arguments(build, more, "optim.")


def _constructor(key: str, target: str) -> Callable[..., Any]:
    """What a `_target_` names."""
    try:
        found: Any = pkgutil.resolve_name(target)
        inspect.signature(found)
    except Exception as error:
        raise _error(f"{key}._target_={target}: nothing to call there ({error})") from error
    return found


def _base(key: str) -> type | None:
    """What the parts of a group have to be."""
    import lightning.pytorch as pl
    from lightning.pytorch.loggers import Logger

    group, _, rest = key.partition(".")
    return {"callbacks": pl.Callback, "logger": Logger}.get(group) if rest.count(".") == 0 else None


def _nodes(node: Any, above: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every mapping with a `_target_`, and its name."""
    if not isinstance(node, Mapping):
        return
    if "_target_" in node:
        yield above, node
    for name, value in node.items():
        yield from _nodes(value, f"{above}.{name}" if above else str(name))


def _check_value(key: str, value: Any, kind: Kind) -> None:
    if kind.fits(value):
        return
    near = nearest(value, kind.choices, most=1) if isinstance(value, str) else None
    hint = f"; {near}" if near else ""
    if isinstance(value, int | float) and kind.fits(str(value)):
        hint = f"; quote it: '{key}=\"{value}\"'"
    raise _error(f"{key}={shown(value)}: expected {kind.words}{hint}")


def shown(value: Any) -> str:
    """A value as it is typed: `null`, `true`, `[1,2]`; long ones cut off."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Mapping):
        text = "{" + ",".join(f"{k}:{shown(v)}" for k, v in value.items()) + "}"
    elif isinstance(value, list | tuple):
        text = "[" + ",".join(map(shown, value)) + "]"
    else:
        text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _check_devices(trainer: Mapping[str, Any]) -> None:
    """Lightning refuses more GPUs than there are, but starts any number of processes on a CPU."""
    import torch

    accelerator, devices = trainer.get("accelerator"), trainer.get("devices")
    if accelerator != "cpu" and (accelerator != "auto" or torch.cuda.is_available()):
        return
    number = len(devices) if isinstance(devices, list) else devices
    cores = max(2, os.cpu_count() or 1)
    if str(number).isdecimal() and int(str(number)) > cores:
        raise _error(f"trainer.devices={shown(devices)}: expected at most {cores} processes here")


def _error(message: str) -> Exception:
    from zoo.errors import ZooError  # which brings torch along

    return ZooError(message)
