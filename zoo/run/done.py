"""Jobs that were done before: with `done=skip` their rows are taken instead of measuring again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import reduce
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omegaconf import DictConfig

Row = dict[str, Any]

# Options that say where and how loudly something is measured, not what.
_FREE = ("done", "results", "paths", "progress", "control", "resolutions", "untrained")
# Options that came after rows had been published, and what they say where those say nothing.
_LATER = {("answers",): False, ("runtime", "buckets"): "auto"}
_FREE_OF_FEATURES = ("cache", "folder", "max_gb")


def digest(cfg: DictConfig) -> str:
    """What tells a job of eval from others: all options that can change a number.

    Args:
        cfg: The composed configuration.
    """
    from omegaconf import OmegaConf

    options: Any = OmegaConf.to_container(cfg, resolve=True)
    options = {k: v for k, v in options.items() if k not in _FREE}
    for (*above, name), same in _LATER.items():
        part = reduce(lambda found, key: found.get(key) or {}, above, options)
        if part.get(name, same) == same:
            part.pop(name, None)
    features = options.get("features") or {}
    options["features"] = {k: v for k, v in features.items() if k not in _FREE_OF_FEATURES}
    text = json.dumps(options, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def short(facts: Mapping[str, Any]) -> str:
    """Eight digits that tell facts from others, for names of folders."""
    from zoo.results.rows import plain

    return hashlib.sha256(json.dumps(plain(facts), sort_keys=True).encode()).hexdigest()[:8]


def done_before(cfg: DictConfig, job: str) -> list[Row]:
    """Rows of the same job, the last of each engine; empty where it has to be run.

    A row of more tasks, all else being equal, answers a job of fewer, and rows of fewer answer a
    job of more together. A job that failed is run again. So is one whose weights have changed
    since; other images under the same name are not noticed.

    Args:
        cfg: The composed configuration; its option `done` says whether rows are looked for.
        job: Its digest.
    """
    if cfg.get("done", "again") != "skip":
        return []
    from zoo.results.rows import read_rows

    asked = _tasks(cfg.task)
    names: dict[frozenset[str], dict[str, None]] = {asked: {job: None}}
    seen: dict[tuple[str, ...], str] = {(): ""}
    found: dict[str, dict[Any, Row]] = {}
    for row in read_rows(str(cfg.results), broken=[]):  # a report says which lines are broken
        order = _order(row)
        if order not in seen:
            seen[order] = _with(cfg, order) if asked & set(order) else ""
            if seen[order]:
                names.setdefault(frozenset(order), {})[seen[order]] = None
        if row.get("job") in (job, seen[order]):
            found.setdefault(row["job"], {})[str(row.get("engine"))] = row
    # What was left out of other tasks may have been left out for one of those.
    done = {
        tasks: rows
        for tasks, jobs in names.items()
        for name in jobs
        if (rows := list(found.get(name, {}).values()))
        and all(_answers(row, cfg, ("ok", "skipped") if name == job else ("ok",)) for row in rows)
    }
    return _together(done, asked)


def _together(done: Mapping[frozenset[str], list[Row]], asked: frozenset[str]) -> list[Row]:
    """Rows that have all these tasks between them, from as few jobs as possible, or none."""
    missing, rows = set(asked), list[Row]()
    while missing:
        best = max(done, key=lambda tasks: (len(missing & tasks), tasks == asked), default=None)
        if best is None or not missing & best:
            return []
        missing -= best
        rows += done[best]
    return rows


def _tasks(named: str | Sequence[str]) -> frozenset[str]:
    return frozenset([named] if isinstance(named, str) else named)


def _order(row: Row) -> tuple[str, ...]:
    """The tasks of a row as they were asked for; none where that is not what stands there."""
    named = row.get("task")
    return tuple(map(str, named)) if isinstance(named, list) else ()


def _with(cfg: DictConfig, tasks: Sequence[str]) -> str:
    """The digest of the same job with these tasks."""
    other = cfg.copy()
    other.task = list(tasks)
    return digest(other)


def _answers(row: Row, cfg: DictConfig, ends: Sequence[str]) -> bool:
    return row.get("status") in ends and _same_weights(row, cfg)


def _same_weights(row: Mapping[str, Any], cfg: DictConfig) -> bool:
    if row.get("weights_sha") is None or cfg.get("weights") is None:
        return True
    from zoo.checkpoint import weights_sha256

    return bool(row["weights_sha"] == weights_sha256(str(cfg.weights)))
