"""From rows to comparisons: what belongs together, what it is measured against, what wins.

One `Entry` is one configuration (method, arguments, backbone, budget, data, trained or not) with
its latest measurements, averaged over its runs where they differ in the seed alone; one `View` is a
set of entries that may be compared with each other.
"""

from __future__ import annotations

import itertools
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from zoo.report import readings
from zoo.report.controls import guests, main_dense, name_controls, was_trained_here
from zoo.report.entry import Comparison, Entry, View
from zoo.report.identity import (
    Identity,
    backbone,
    cost_options,
    has_quality,
    same_weights,
    trained,
    weights,
)
from zoo.report.names import name_entries
from zoo.report.notes import notes_on
from zoo.report.pareto import pareto_front
from zoo.report.quality import Metric, Quality, averaged, main_metric, qualities
from zoo.report.readings import Row, Speed
from zoo.report.references import set_references
from zoo.report.words import (
    DENSE,
    describe_budget,
    interval,
    is_dense,
    is_without_result,
    most_gmacs,
    number,
    printable,
    tasks,
    total_gmacs,
)


def compare(rows: Iterable[Row]) -> Comparison:
    """Group rows into entries and views.

    The same configuration may have been run several times. Runs with several seeds are averaged; of
    each run the latest row with an accuracy counts, and the latest with a throughput for each
    hardware setting, so that a later run that only measures one thing hides nothing. The rows that
    do not count are in `Comparison.others`. A row that lies in two files, with one run_id, is one
    row. Rows that were measured on fewer images than others of the same data are entries, and
    views, of their own.
    """
    ordered = [_or_failed(printable(row)) for row in _without_copies(rows)]
    ordered.sort(key=lambda row: str(row.get("created") or ""))
    failed = [row for row in ordered if is_without_result(row)]
    good = [row for row in ordered if not is_without_result(row)]
    identity = Identity(good)
    judged: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    costs: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in good:
        if has_quality(row):
            judged[identity.key(row)].append(row)
        else:
            # Cost and speed do not depend on data or weights: these complete what has answers.
            key = (identity.setting(row), *cost_options(row))
            costs[key].append(row)

    numbers = {id(row): index for index, row in enumerate(ordered)}
    entries, others = [], []
    owners: dict[str, list[Entry]] = defaultdict(list)
    for (configuration, *_), own in judged.items():
        extra = [r for key, rest in costs.items() if key[0] == configuration for r in rest]
        entry = _entry(own, extra, numbers, identity)
        entries.append(entry)
        owners[configuration].append(entry)
        others += [(row, entry) for row in own if row is not entry.row]
    for (configuration, *_), own in costs.items():
        found = owners[configuration]
        owner = next((e for e in found if cost_options(e.row) == cost_options(own[-1])), None)
        owner = owner or next((e for e in found if _completes(own[-1], e.row)), None)
        if owner is None:
            owner = _entry(own, [], numbers, identity)
            entries.append(owner)
        others += [(row, owner) for row in own if row is not owner.row]
    groups: dict[tuple[str, str], list[Entry]] = defaultdict(list)
    for entry in entries:
        groups[entry.backbone, entry.data].append(entry)
    mains = []
    for (_, data), members in groups.items():
        set_references(members, identity)
        main = main_dense(members)
        name_controls(members, main)
        mains.append((main, data))
    name_entries(entries, identity)
    new_id = itertools.count(len(ordered)).__next__
    for (main, _), members in zip(mains, groups.values(), strict=True):
        members += guests(main, mains, new_id) if main else []
    gaps = [row for row in failed if not succeeded_later(row, good, identity)]
    views = _views(groups, [main for main, _ in mains], gaps)
    return Comparison(ordered, entries, views, others, failed, gaps)


def _without_copies(rows: Iterable[Row]) -> Iterable[Row]:
    seen = set()
    for row in rows:
        run_id = str(row.get("run_id") or "")
        if not run_id or run_id not in seen:
            yield row
        seen.add(run_id)


def _or_failed(row: Row) -> Row:
    """The row; a failure if it says that it measured an accuracy and holds none (NaN is none)."""
    measured = "accuracy" in tasks(row)
    if is_without_result(row) or not measured or number(row.get("top1")) is not None:
        return row
    return {**row, "status": "failed", "error": row.get("error") or "its accuracy is no number"}


def succeeded_later(failed: Row, rows: Iterable[Row], identity: Identity) -> bool:
    """Whether what failed was run again with success, as far as a failed row tells what it was."""

    def what(row: Row) -> tuple[Any, ...]:
        data = row.get("dataset") if failed.get("dataset") else None
        seed = row.get("seed") if failed.get("seed") is not None else None
        budget = describe_budget(row.get("schedule"))
        done = ({"train", "accuracy"} & tasks(failed)) <= tasks(row)
        return row.get("backbone"), row.get("method") or DENSE, budget, data, seed, done

    return any(
        not is_without_result(row)
        and what(row) == (*what(failed)[:-1], True)
        and _same_weights(failed, row)
        and identity.whole(row)  # a short run does not show that the whole one works
        and str(row.get("created")) > str(failed.get("created"))
        for row in rows
    )


def _same_weights(failed: Row, row: Row) -> bool:
    # A training that failed names the weights that it began with, one that succeeded its own.
    return was_trained_here(failed) or not weights(failed) or same_weights(failed, row)


# ---------------------------------------------------------------------------------- entries


def _completes(extra: Row, row: Row) -> bool:
    """Whether what was measured beside the answers is of the same model.

    Another cost is another model (say, with another head), or one run with other options.
    """
    one, other = most_gmacs(extra), most_gmacs(row)
    return one is None or other is None or abs(one - other) <= 0.01 * other


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _entry(
    own: list[Row], extra: list[Row], numbers: Mapping[int, int], identity: Identity
) -> Entry:
    latest: dict[str, Row] = {}
    for one in own:  # oldest first
        name = identity.run(one)
        if name not in latest or _tells(one) >= _tells(latest[name]):
            latest[name] = one
    runs = {k: r for k, r in latest.items() if number(r.get("top1")) is not None} or latest
    row = next(reversed(sorted(runs.values(), key=lambda r: numbers[id(r)])))
    candidates = sorted([*extra, *own], key=lambda r: numbers[id(r)])
    alike = [r for r in candidates if cost_options(r) == cost_options(row)]
    counted = [r for r in alike if total_gmacs(r) is not None]
    # A mean over images belongs to its weights and data; what the accuracy's row says comes first.
    cost = row if total_gmacs(row) is not None or not counted else _most_images(counted)
    tokens = next((r["tokens"] for r in [row, *reversed(alike)] if r.get("tokens")), None)
    speeds: dict[str, Speed] = {}
    for candidate in candidates:  # oldest first: the latest of each setting stays
        if _completes(candidate, cost):
            speeds.update(readings.speeds(candidate))
    drawn = [r for r in candidates if r.get("picture") and _completes(r, cost)]
    dense = is_dense(row)
    scores = [value for r in runs.values() if (value := number(r.get("top1"))) is not None]
    ends = {interval(r) for r in runs.values()}
    return Entry(
        id=numbers[id(row)],
        row=row,
        dense=dense,
        trained=trained(row),
        backbone=backbone(row),
        data=identity.data(row) if has_quality(row) else "",
        name="dense" if dense else str(row["method"]),
        budget="" if dense else describe_budget(row.get("schedule")),
        # Trained weights of an adaptive method cost something else in every run.
        gmacs=_mean(total_gmacs(r) for r in runs.values()) or total_gmacs(cost),
        cost=cost,
        tokens=tokens,
        top1=_mean(scores),
        # Of several runs only the same interval is theirs.
        interval=ends.pop() if len(ends) == 1 else None,
        runs=runs if scores else {},
        partial=has_quality(row) and not identity.whole(row),
        spread=statistics.stdev(scores) if len(scores) > 1 else None,
        reference_gmacs=number(row.get("gmacs_dense")),
        fidelity=_fidelity(own, identity),
        quality=_quality(own, identity),
        reducer_share=readings.reducer_share(cost),
        speeds=speeds,
        picture=drawn[-1] if drawn else None,
    )


def _most_images(rows: Sequence[Row]) -> Row:
    """The row whose cost is a mean over most images; of equal ones the latest."""

    def count(row: Row) -> float:
        sample = row.get("gmacs_sample")
        return number(sample.get("images")) or 0.0 if isinstance(sample, Mapping) else 0.0

    return max(reversed(rows), key=count)


def _fidelity(own: Sequence[Row], identity: Identity) -> dict[str, float]:
    """The mean over the runs of what was measured against the dense model."""
    latest = {identity.run(row): row for row in own if readings.fidelity(row)}
    found: dict[str, list[float]] = defaultdict(list)
    for row in latest.values():
        for name, value in readings.fidelity(row).items():
            found[name].append(value)
    return {name: statistics.fmean(values) for name, values in found.items()}


def _tells(row: Row) -> int:
    """How much a row says of the answers: an accuracy most, what is like one less."""
    return 2 if number(row.get("top1")) is not None else int(bool(qualities(row)))


def _quality(own: Sequence[Row], identity: Identity) -> dict[str, Quality]:
    """The mean over the runs of what was measured on features, the latest of each run."""
    runs: dict[str, dict[str, Quality]] = defaultdict(dict)
    for row in own:  # oldest first
        runs[identity.run(row)].update(qualities(row))
    return averaged(runs.values())


# ------------------------------------------------------------------------------------ views


def _views(
    groups: Mapping[tuple[str, str], list[Entry]],
    mains: Sequence[Entry | None],
    gaps: Sequence[Row],
) -> list[View]:
    views = []
    by_data: dict[str, list[View]] = defaultdict(list)
    for ((name, data), members), main in zip(groups.items(), mains, strict=True):
        dense = [] if main is None else [main]
        view = _view(f"{name} · {data or 'costs only'}", members, dense)
        view.failures = [row for row in gaps if _belongs(row, members[0])]
        views.append(view)
        by_data[data].append(view)
    # Most accuracies first: what opens is what there is most to see in. Short runs come last.
    views.sort(key=lambda v: (v.partial, -_measured(v), v.label))
    for data, parts in sorted(by_data.items()):
        if data and len(parts) > 1:
            everything = [entry for part in parts for entry in part.entries if not entry.guest]
            dense = [entry for part in parts for entry in part.dense]
            view = _view(f"all backbones · {data}", everything, dense, combined=True)
            view.failures = [row for row in gaps if any(row in part.failures for part in parts)]
            views.append(view)
    return views


_JUDGING = {"accuracy", "fidelity", "knn", "linear_probe", "retrieval", "zeroshot"}


def _measured(view: View) -> int:
    """How many entries have what the view goes by."""
    return sum(entry.score(view.metric) is not None for entry in view.entries)


def _belongs(failed: Row, entry: Entry) -> bool:
    """Whether a run that failed would have stood beside this entry."""
    data = failed.get("dataset")
    judged = _JUDGING & tasks(failed)
    if data and (judged or was_trained_here(failed)):
        return failed.get("backbone") == entry.row.get("backbone") and bool(
            entry.data and data == entry.row.get("dataset")
        )
    return failed.get("backbone") == entry.row.get("backbone")


def _front(
    entries: Sequence[Entry], cost: Callable[[Entry], float | None], metric: Metric
) -> list[Entry]:
    flags = pareto_front([(cost(entry), entry.score(metric)) for entry in entries])
    front = [entry for entry, flag in zip(entries, flags, strict=True) if flag]
    return sorted(front, key=lambda entry: (cost(entry) or 0.0, entry.id))


def _view(label: str, entries: list[Entry], dense: list[Entry], *, combined: bool = False) -> View:
    entries = sorted(entries, key=_place)
    count: dict[str, int] = defaultdict(int)
    for entry in entries:
        for name in entry.speeds:
            count[name] += 1
    metric = main_metric(entry.measured for entry in entries)
    speed_fronts = {}
    for name in sorted(count, key=lambda name: (-count[name], name.startswith("cpu"), name)):
        with_speed = [entry for entry in entries if name in entry.speeds]
        speed_fronts[name] = _front(with_speed, lambda e, name=name: -e.speeds[name].rate, metric)  # type: ignore[misc]
    front = _front(entries, lambda e: e.gmacs, metric)
    untrained = _front([e for e in entries if not e.trained], lambda e: e.gmacs, metric)
    return View(
        label,
        entries,
        dense,
        front,
        speed_fronts,
        notes_on(entries),
        untrained,
        combined=combined,
        metric=metric,
    )


def _place(entry: Entry) -> tuple[Any, ...]:
    """Dense models first, then their controls, then by method and falling cost."""
    kind = (not entry.dense, entry.control or "", entry.name)
    return *kind, -(entry.gmacs or 0), entry.trained, entry.id
