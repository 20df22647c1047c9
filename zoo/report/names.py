"""Names of entries: short, and different where the entries are."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from zoo.report.identity import arguments, cost_options, options, precision
from zoo.report.words import DENSE, plugins

if TYPE_CHECKING:
    from zoo.report.entry import Entry
    from zoo.report.identity import Identity


def name_entries(entries: Sequence[Entry], identity: Identity) -> None:
    """Add what tells one entry from another to their names and budgets.

    Arguments of a method that was run with several become part of its name, so that each variant
    is a curve of its own. What else differs between two entries of the same name and budget
    (input size, details of the schedule, run-time options, precision, training, weights) is added
    to the budget.

    Args:
        entries: All entries of a report.
        identity: Of the report's rows.
    """
    for same in _grouped(entries, lambda e: e.name):
        mappings = [arguments(entry.row) for entry in same]
        keys = [] if same[0].dense else _differing(mappings)
        for entry, mapping in zip(same, mappings, strict=True):
            parts = [_argument(key, mapping[key]) for key in keys if mapping.get(key) is not None]
            entry.name += "".join(f" +{plugin}" for plugin in plugins(entry.row))
            entry.name += f" ({', '.join(parts)})" if parts else ""

    def schedule(entry: Entry, keys: Sequence[str]) -> str:
        mapping = _mapping(entry.row.get("schedule"))
        return " ".join(
            _argument(key, mapping[key]) for key in keys if mapping.get(key) is not None
        )

    def size(entry: Entry) -> str:
        return f"{entry.row['img_size']} px" if entry.row.get("img_size") else ""

    def weights(entry: Entry) -> str:
        return str(entry.row.get("weights") or "untrained weights")[-24:]

    def training(entry: Entry, keys: Sequence[str]) -> str:
        mapping = _mapping(identity.training(entry.row))
        return " ".join(_argument(key, mapping[key]) for key in keys if key in mapping)

    def alike(entry: Entry) -> tuple[str, ...]:
        return entry.backbone, entry.data, entry.title, entry.budget

    for entry in entries:
        if entry.dense and (method := identity.of_a_training(entry.row)):
            training_with = "trained dense" if method == DENSE else f"weights trained with {method}"
            entry.budget = f"{entry.budget} {training_with}".lstrip()
    for same in _grouped(entries, alike):
        _add(same, [size(entry) for entry in same])
    for same in _grouped(entries, alike):
        keys = _differing([_mapping(entry.row.get("schedule")) for entry in same])
        _add(same, [schedule(entry, keys) for entry in same])
    for same in _grouped(entries, alike):
        _add(same, [", ".join(_options(entry)) for entry in same])
    for same in _grouped(entries, alike):
        _add(same, [precision(entry.row) for entry in same])
    for digests in (False, True):  # which say little, so only where nothing else does
        for same in _grouped(entries, alike):
            keys = _differing([_mapping(identity.training(entry.row)) for entry in same])
            keys = [key for key in keys if (key in ("options", "start_sha")) == digests]
            _add(same, [training(entry, keys) for entry in same])
    for same in _grouped(entries, alike):
        _add(same, [weights(entry) for entry in same])


def methods_of(entries: Iterable[Entry]) -> set[str]:
    """Registry names of the methods among some entries: the one count of methods of a report.

    Arguments, budgets, seeds and added plugins make no other method; a plugin without a reducer
    is one.
    """
    found = set()
    for entry in entries:
        if not entry.dense:
            own = str(entry.row.get("method") or DENSE)
            found.add(own if own != DENSE else "+".join(plugins(entry.row)))
    return found


def _options(entry: Entry) -> list[str]:
    # Where only costs are known, other options are settings of the speed.
    return options(entry.row) if entry.data else cost_options(entry.row)


def _grouped(entries: Iterable[Entry], key: Callable[[Entry], Any]) -> list[list[Entry]]:
    groups: dict[Any, list[Entry]] = defaultdict(list)
    for entry in entries:
        groups[key(entry)].append(entry)
    return list(groups.values())


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _differing(mappings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Keys that do not have the same value in all mappings, in order of first sight."""
    found = []
    for key in dict.fromkeys(key for mapping in mappings for key in mapping if key != "name"):
        values = {json.dumps(m.get(key), sort_keys=True, default=str) for m in mappings}
        if len(values) > 1:
            found.append(key)
    return found


def _argument(key: str, value: Any) -> str:
    return value if isinstance(value, str) else f"{key}={value}"


def _add(entries: Sequence[Entry], texts: Sequence[str]) -> None:
    if len(set(texts)) > 1:
        for entry, text in zip(entries, texts, strict=True):
            entry.budget = " ".join(part for part in (entry.budget, text) if part)
