"""From rows to comparisons: what belongs together, what it is measured against, what wins.

One `Entry` is one configuration (method, arguments, backbone, budget, data, trained or not) with
its latest measurements; one `View` is a set of entries that may be compared with each other.
"""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from zoo.report import readings
from zoo.report.controls import guests, main_dense, name_controls, was_trained_here
from zoo.report.entry import Comparison, Entry, View
from zoo.report.names import name_entries, plugins
from zoo.report.notes import notes_on
from zoo.report.pareto import pareto_front
from zoo.report.readings import Row, Speed
from zoo.report.words import (
    DENSE,
    describe_budget,
    interval,
    is_dense,
    most_gmacs,
    number,
    total_gmacs,
)


def compare(rows: Iterable[Row]) -> Comparison:
    """Group rows into entries and views.

    The same configuration may have been run several times: the latest row with an accuracy
    counts, and the latest with a throughput for each hardware setting, so that a later run that
    only measures one thing hides nothing. The rows that do not count are in `Comparison.others`.
    A row that lies in two files, with one run_id, is one row.
    """
    ordered = sorted(_without_copies(rows), key=lambda row: str(row.get("created") or ""))
    failed = [row for row in ordered if row.get("status") == "failed"]
    measured: dict[tuple[str, str, str], list[Row]] = defaultdict(list)
    costs: dict[str, list[Row]] = defaultdict(list)
    for row in ordered:
        if row.get("status") == "failed":
            continue
        if number(row.get("top1")) is None:
            # Cost and speed do not depend on data or weights: these complete what has accuracy.
            costs[_configuration(row)].append(row)
        else:
            measured[_configuration(row), _weights(row), _data(row)].append(row)

    numbers = {id(row): index for index, row in enumerate(ordered)}
    entries, others = [], []
    for (configuration, *_), own in measured.items():
        entry = _entry(own, costs.get(configuration, []), numbers)
        entries.append(entry)
        others += [(row, entry) for row in own if row is not entry.row]
    owners = {_configuration(entry.row): entry for entry in entries}
    for configuration, own in costs.items():
        owner = owners.get(configuration)
        if owner is None:
            owner = _entry(own, [], numbers)
            entries.append(owner)
        others += [(row, owner) for row in own if row is not owner.row]
    groups: dict[tuple[str, str], list[Entry]] = defaultdict(list)
    for entry in entries:
        groups[entry.backbone, entry.data].append(entry)
    mains = []
    for (_, data), members in groups.items():
        _set_references(members)
        main = main_dense(members)
        name_controls(members, main)
        mains.append((main, data))
    name_entries(entries)
    new_id = itertools.count(len(ordered)).__next__
    for (main, _), members in zip(mains, groups.values(), strict=True):
        members += guests(main, mains, new_id) if main else []
    gaps = [row for row in failed if not succeeded_later(row, ordered)]
    views = _views(groups, [main for main, _ in mains], gaps)
    return Comparison(ordered, entries, views, others, failed)


def _without_copies(rows: Iterable[Row]) -> Iterable[Row]:
    seen = set()
    for row in rows:
        run_id = row.get("run_id")
        if run_id is None or run_id not in seen:
            yield row
        seen.add(run_id)


def succeeded_later(failed: Row, rows: Iterable[Row]) -> bool:
    """Whether what failed was run again with success, as far as a failed row tells what it was."""

    def what(row: Row) -> tuple[Any, ...]:
        data = row.get("dataset") if failed.get("dataset") else None
        budget = describe_budget(row.get("schedule"))
        return row.get("backbone"), row.get("method") or DENSE, budget, data

    return any(
        row.get("status") != "failed"
        and what(row) == what(failed)
        and str(row.get("created")) > str(failed.get("created"))
        for row in rows
    )


# ---------------------------------------------------------------------------------- entries


def _canonical(value: Any) -> str:
    if isinstance(value, Mapping):
        value = {key: item for key, item in value.items() if item is not None}
    return json.dumps(value, sort_keys=True, default=str)


def _configuration(row: Mapping[str, Any]) -> str:
    # A dense model has no budget: the runs of a sweep over budgets are the same run.
    method = [DENSE] if is_dense(row) else [row["method"], row.get("reducer"), row.get("schedule")]
    return _canonical(
        [
            *[_canonical(part) for part in method],
            _backbone(row),
            row.get("img_size"),
            _trained(row),
            plugins(row),
        ]
    )


def _backbone(row: Mapping[str, Any]) -> str:
    name, tag = str(row.get("backbone") or "?"), row.get("tag")
    return f"{name}.{tag}" if tag else name


def _data(row: Mapping[str, Any]) -> str:
    dataset, split = row.get("dataset"), row.get("split")
    if not dataset:
        return "unnamed data"
    return f"{dataset} ({split})" if split else str(dataset)


def _trained(row: Mapping[str, Any]) -> bool:
    # All dense weights were trained dense; here those count that a training run has just made.
    return was_trained_here(row) if is_dense(row) else bool(row.get("trained"))


def _weights(row: Mapping[str, Any]) -> str:
    # Trained weights are new with every run: only of those that were given several can differ.
    return "" if _trained(row) else str(row.get("weights_sha") or row.get("weights") or "")


def _entry(own: list[Row], extra: list[Row], numbers: Mapping[int, int]) -> Entry:
    row = next((r for r in reversed(own) if number(r.get("top1")) is not None), own[-1])
    candidates = sorted([*extra, *own], key=lambda r: numbers[id(r)])
    counted = [r for r in candidates if total_gmacs(r) is not None]
    # A mean over images belongs to its weights and data; what the accuracy's row says comes first.
    cost = row if total_gmacs(row) is not None or not counted else counted[-1]
    gmacs, limit = total_gmacs(cost), most_gmacs(cost)
    tokens = next((r["tokens"] for r in [row, *reversed(candidates)] if r.get("tokens")), None)
    speeds: dict[str, Speed] = {}
    for candidate in candidates:  # oldest first: the latest of each setting stays
        other = most_gmacs(candidate)
        # Another cost is another model (say, with another head): not a measurement of this one.
        if other is None or limit is None or abs(other - limit) <= 0.01 * limit:
            speeds.update(readings.speeds(candidate))
    dense = is_dense(row)
    return Entry(
        id=numbers[id(row)],
        row=row,
        dense=dense,
        trained=_trained(row),
        backbone=_backbone(row),
        data="" if number(row.get("top1")) is None else _data(row),
        name="dense" if dense else str(row["method"]),
        budget="" if dense else describe_budget(row.get("schedule")),
        gmacs=gmacs,
        cost=cost,
        tokens=tokens,
        top1=number(row.get("top1")),
        interval=interval(row),
        reference_gmacs=number(row.get("gmacs_dense")),
        fidelity=readings.fidelity(candidates),
        reducer_share=readings.reducer_share(cost),
        speeds=speeds,
    )


# ------------------------------------------------------------------------------------ views


def _views(
    groups: Mapping[tuple[str, str], list[Entry]],
    mains: Sequence[Entry | None],
    gaps: Sequence[Row],
) -> list[View]:
    views = []
    by_data: dict[str, list[View]] = defaultdict(list)
    for ((backbone, data), members), main in zip(groups.items(), mains, strict=True):
        dense = [] if main is None else [main]
        view = _view(f"{backbone} · {data or 'costs only'}", members, dense)
        view.failures = [row for row in gaps if _belongs(row, members[0])]
        views.append(view)
        by_data[data].append(view)
    # Most accuracies first: what opens is what there is most to see in.
    views.sort(key=lambda v: (-sum(e.top1 is not None for e in v.entries), v.label))
    for data, parts in sorted(by_data.items()):
        if data and len(parts) > 1:
            everything = [entry for part in parts for entry in part.entries if not entry.guest]
            dense = [entry for part in parts for entry in part.dense]
            view = _view(f"all backbones · {data}", everything, dense, combined=True)
            view.failures = [row for row in gaps if any(row in part.failures for part in parts)]
            views.append(view)
    return views


def _belongs(failed: Row, entry: Entry) -> bool:
    """Whether a run that failed would have stood beside this entry."""
    data = failed.get("dataset")
    accuracy = "accuracy" in (failed.get("task") or ()) or was_trained_here(failed)
    if accuracy and data:
        return failed.get("backbone") == entry.row.get("backbone") and bool(
            entry.data and data == entry.row.get("dataset")
        )
    return failed.get("backbone") == entry.row.get("backbone")


def _set_references(members: Sequence[Entry]) -> None:
    """Give every entry of one backbone and data its dense model."""
    dense = [entry for entry in members if entry.dense]

    def fits(base: Entry, row: Row) -> tuple[Any, ...]:
        # Same input size, not retrained, same weights; then the latest.
        size = base.row.get("img_size") == row.get("img_size")
        return size, not base.trained, _weights(base.row) == _weights(row), base.id

    for entry in members:
        base = max(dense, key=lambda d, row=entry.row: fits(d, row), default=None)  # type: ignore[misc]
        if base is None:
            continue
        entry.reference_id, entry.reference_top1 = base.id, base.top1
        entry.reference_gmacs = entry.reference_gmacs or base.gmacs
        for name, speed in entry.speeds.items():
            if speed.dense is None and name in base.speeds:
                entry.speeds[name] = replace(speed, dense=base.speeds[name].rate)


def _front(entries: Sequence[Entry], cost: Callable[[Entry], float | None]) -> list[Entry]:
    flags = pareto_front([(cost(entry), entry.top1) for entry in entries])
    front = [entry for entry, flag in zip(entries, flags, strict=True) if flag]
    return sorted(front, key=lambda entry: (cost(entry) or 0.0, entry.id))


def _view(label: str, entries: list[Entry], dense: list[Entry], *, combined: bool = False) -> View:
    entries = sorted(entries, key=_place)
    count: dict[str, int] = defaultdict(int)
    for entry in entries:
        for name in entry.speeds:
            count[name] += 1
    speed_fronts = {}
    for name in sorted(count, key=lambda name: (-count[name], name.startswith("cpu"), name)):
        with_speed = [entry for entry in entries if name in entry.speeds]
        speed_fronts[name] = _front(with_speed, lambda e, name=name: -e.speeds[name].rate)  # type: ignore[misc]
    front = _front(entries, lambda e: e.gmacs)
    untrained = _front([e for e in entries if not e.trained], lambda e: e.gmacs)
    return View(
        label, entries, dense, front, speed_fronts, notes_on(entries), untrained, combined=combined
    )


def _place(entry: Entry) -> tuple[Any, ...]:
    """Dense models first, then their controls, then by method and falling cost."""
    kind = (not entry.dense, entry.control or "", entry.name)
    return *kind, -(entry.gmacs or 0), entry.trained, entry.id
