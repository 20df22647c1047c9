"""Options that are right one by one and make no sense together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override


#: What an evaluation takes of a trainer; the rest is about fitting.
WHERE = ("accelerator", "strategy", "devices", "num_nodes")
_LOOKUPS = ("knn", "linear_probe", "retrieval")
# Options, and the tasks that look at them.
_NEEDS = {
    **{key: (*_LOOKUPS, "select") for key in ("gallery", "gallery_split", "gallery_limit")},
    **{key: (key,) for key in (*_LOOKUPS, "zeroshot", "visualize")},
    "knn": ("knn", "select"),
    "selector": ("select", "visualize"),
    "select": ("select", "visualize"),
    "images": ("visualize",),
    "features": (*_LOOKUPS, "zeroshot", "select"),
    "export": ("export",),
}


def check_sense(cfg: Mapping[str, Any], kind: str, typed: Sequence[str]) -> None:
    """Refuses options that contradict each other or that nothing would look at.

    What is swept over is left alone: one value of it may need what another has no use for.

    Args:
        cfg: The composed configuration, in plain containers and checked value by value.
        kind: "train" or "eval".
        typed: The overrides of this run; with -m those of the sweep.

    Raises:
        ZooError: With what to leave out or to add.
    """
    overrides = _parsed(typed)
    swept = {o.key_or_group for o in overrides if o.is_sweep_override()}
    keys = [o.key_or_group for o in overrides if not (o.is_delete() or _unset(o))]
    _schedule_without_reducer(cfg, kind, keys, swept)
    _two_of(keys, "schedule.gmacs", "schedule.fraction")
    _two_of(keys, "schedule.file", "schedule.keep")
    _two_of(keys, "schedule.file", "schedule.prune")
    if (cfg.get("backbone") or {}).get("pretrained") and cfg.get("weights") is not None:
        raise _error(
            f"backbone.pretrained=true and weights={cfg['weights']}: two sources of weights; "
            "leave one of them out"
        )
    if kind == "eval" and "task" not in swept:
        _unread(cfg, keys)
    _best(cfg.get("callbacks") or {})
    if kind == "train" and cfg["test"] == "best":
        _kept(cfg.get("callbacks") or {}, "test" in keys)
    trainer = cfg.get("trainer") or {}
    if kind == "eval":
        _only_where(keys)
        return
    least, most = trainer.get("min_epochs"), trainer.get("max_epochs")
    if least is not None and most not in (None, -1) and least > most:
        raise _error(f"trainer.min_epochs={least} is more than trainer.max_epochs={most}")
    if most in (None, -1) and trainer.get("max_steps", -1) == -1:
        if trainer.get("max_time") is None:
            ends = "never ends" if most == -1 else "says no end"
            raise _error(
                f"trainer.max_epochs={'null' if most is None else most} {ends}; type a number of "
                "epochs, or an end such as +trainer.max_steps=1000"
            )


def _schedule_without_reducer(
    cfg: Mapping[str, Any], kind: str, keys: Sequence[str], swept: set[str]
) -> None:
    key = next((k for k in keys if k == "schedule" or k.startswith("schedule.")), None)
    if key is None or swept & {"reducer", "experiment", "schedule"}:
        return
    reducer = cfg.get("reducer")
    if reducer is None:
        # Weights may bring their reducer along, and train.py alone fine-tunes with ToMe.
        if cfg.get("weights") is None and (kind == "eval" or cfg.get("backbone") is not None):
            raise _error(
                f"{key} without a reducer: a schedule says how many tokens a reducer leaves; "
                "add reducer=NAME, e.g. reducer=tome, or leave the schedule out"
            )
    elif reducer.get("_target_") == "reduction.registry.no_reducer":
        raise _error(f"{key} with reducer=none: nothing is reduced; leave one of them out")


def _unread(cfg: Mapping[str, Any], keys: Sequence[str]) -> None:
    """Options that belong to a task which is not done."""
    task = cfg["task"]
    tasks = [task] if isinstance(task, str) else list(task)
    for key in keys:
        if key.split(".")[0] == "throughput" and "throughput" not in tasks:
            more = ",".join([*tasks, "throughput"])
            raise _error(f"{key} has no effect without the throughput task; add task=[{more}]")
        needed = _NEEDS.get(key.split(".")[0])
        if needed and not set(needed) & set(tasks):
            more = ",".join([*tasks, needed[0]])
            raise _error(f"{key} has no effect without the {_or(needed)} task; add task=[{more}]")
        if key == "limit" and tasks == ["throughput"]:
            raise _error("limit has no effect: task=throughput looks at no data; leave it out")


def _only_where(keys: Sequence[str]) -> None:
    """An evaluation takes of a trainer where it runs."""
    for key in keys:
        group, _, name = key.partition(".")
        if group == "trainer" and name and name.partition(".")[0] not in WHERE:
            instead = "; type dtype=bfloat16 or dtype=float16" if name == "precision" else ""
            raise _error(
                f"{key} has no effect on an evaluation, which takes {', '.join(WHERE)} of a "
                f"trainer{instead or '; leave it out'}"
            )


def _or(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"


def _best(callbacks: Mapping[str, Any]) -> None:
    """The epoch that counts as the best is not the worst one."""
    for name, node in callbacks.items():
        node = node if isinstance(node, Mapping) else {}
        monitor, mode = str(node.get("monitor")), node.get("mode")
        better = "max" if "top" in monitor else "min" if "loss" in monitor else mode
        if mode is not None and mode != better:
            raise _error(
                f"callbacks.{name}.mode={mode}: of {monitor} the best is its {better}imum; "
                f"type callbacks.{name}.mode={better}"
            )


def _kept(callbacks: Mapping[str, Any], asked: bool) -> None:
    """There is a best epoch to test, where that was asked for."""
    watching = {
        name: node
        for name, node in callbacks.items()
        if isinstance(node, Mapping) and node.get("monitor") is not None and "save_top_k" in node
    }
    if watching and all(node["save_top_k"] == 0 for node in watching.values()):
        raise _error(
            f"callbacks.{next(iter(watching))}.save_top_k=0 keeps no best epoch; add test=last"
        )
    if asked and not watching:
        raise _error("test=best: no callback keeps the best epoch; add test=last")


def _two_of(keys: Sequence[str], one: str, other: str) -> None:
    if one in keys and other in keys:
        raise _error(f"{one} and {other} say the same thing in two ways; leave one of them out")


def _parsed(typed: Sequence[str]) -> list[Override]:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    overrides = [text for text in typed if not text.startswith("-")]
    return OverridesParser.create().parse_overrides(overrides)


def _unset(override: Override) -> bool:
    """Whether it only takes back what was chosen: `limit=null`, `schedule=default`."""
    return override.value() is None or override.value() == "default"


def _error(message: str) -> Exception:
    from zoo.errors import ZooError  # which brings torch along

    return ZooError(message)
