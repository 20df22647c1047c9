"""Which dense model an entry is compared with, and how that one differs from the ideal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from zoo.report.entry import Entry
from zoo.report.identity import Identity, options, precision, same_weights, weights


def set_references(members: Sequence[Entry], identity: Identity) -> None:
    """Give every entry of one backbone and data its dense model, where there is one.

    Weights that were not trained for the purpose are compared with the dense model of the same
    weights or with none: of other weights the difference would say nothing about the reduction.
    Trained weights are compared with those that training began with, where the rows tell; else with
    given ones rather than with dense weights of a training.

    Args:
        members: Entries of one backbone and data.
        identity: Of the report's rows.
    """
    dense = [entry for entry in members if entry.dense]
    for entry in members:
        fitting = [d for d in dense if entry.trained or same_weights(d.row, entry.row)]
        start = _start(identity.training(entry.row))

        def rank(base: Entry, own: Entry = entry, start: str | None = start) -> tuple[Any, ...]:
            began = start is not None and start in _names(base.row)
            given = not base.trained and not identity.of_a_training(base.row)
            return (*_alike(base, own), began, given, not base.trained, base.id)

        base = max(fitting, key=rank, default=None)
        if base is None:
            continue
        entry.reference_id, entry.reference_top1 = base.id, base.top1
        entry.reference_quality = base.quality
        entry.reference_gmacs = entry.reference_gmacs or base.gmacs
        entry.reference_differs = _differences(base, entry, start, identity.of_a_training(base.row))
        for name, speed in entry.speeds.items():
            if speed.dense is None and name in base.speeds:
                entry.speeds[name] = replace(speed, dense=base.speeds[name].rate)


def _alike(base: Entry, own: Entry) -> tuple[bool, bool, bool]:
    one, other = base.row, own.row
    return (
        one.get("img_size") == other.get("img_size"),
        options(one) == options(other),
        precision(one) == precision(other),
    )


def _start(training: Any) -> str | None:
    """The weights that a training began with: their hash, or their name."""
    if not isinstance(training, Mapping):
        return None
    found = training.get("start_sha") or training.get("start")
    return None if found is None else str(found)


def _names(row: Mapping[str, Any]) -> set[str]:
    return {str(row[key]) for key in ("weights_sha", "weights") if row.get(key)}


def _differences(base: Entry, own: Entry, start: str | None, training: str) -> list[str]:
    """In what the dense model is another one than it should be, in words."""
    if own.dense:
        return []
    size, runtime, computed = _alike(base, own)
    found = []
    if not size:
        found.append(f"at {base.row.get('img_size')} px")
    if not runtime:
        found.append(f"with {', '.join(options(base.row)) or 'no run-time options'}")
    if not computed:
        found.append(f"in {precision(base.row)}")
    if own.trained and training:
        found.append(f"of weights that were trained with {training}")
    elif own.trained and start is not None and start not in _names(base.row):
        found.append(f"of other weights ({weights(base.row)[:12] or 'unknown'})")
    return found
