"""Tables from the rows of the suite `modes`, for docs/performance.md and docs/deploy.md."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.jobs import FRACTION, METHODS, MODELS, MODES, PRECISIONS, Job, jobs
from benchmarks.markdown import markdown
from zoo.measure.machine import in_words

BEGIN = "<!-- modes: python -m benchmarks.table results/speed/modes.jsonl --write -->"
END = "<!-- end of modes -->"
DEPLOYED = "<!-- deployed: python -m benchmarks.table results/speed/modes.jsonl --write -->"
END_OF_DEPLOYED = "<!-- end of deployed -->"
#: What the page on deploying speaks of.
_ON_DEPLOY = ("deit_small", "dinov2_small_518")

Row = Mapping[str, Any]


def of_modes(rows: Sequence[Row]) -> list[Row]:
    """The rows of the suite."""
    return [row for row in rows if (row.get("bench") or {}).get("suite") == "modes"]


def modes_table(rows: Sequence[Row]) -> str:
    """Markdown: where it was measured, and a line per job, the jobs in the order of the suite."""
    found = _by_job(rows)
    if not found:
        return "No rows yet: `python -m benchmarks.speed --suite modes` writes them."
    lines = [["model", "precision, mode", "batch", "threads", "dense ms", "timm ms", *METHODS]]
    reached = aimed = 0
    for job in (*jobs("cpu"), *jobs("cuda")):
        if (own := found.get(str(job))) is None:
            continue
        first = next((row for row in own.values() if ok(row)), None)
        both = (first["bench"]["ms_dense"] if first else {}) or {}
        cells = [MODELS[job.model][2], _kind(job), str(job.batch)]
        cells.append(str(job.threads) if job.device == "cpu" else job.device)
        cells += [f"{both[key]:.1f}" if key in both else "" for key in ("dense", "timm")]
        for method in METHODS:
            row = own.get(method)
            cells.append(_cell(row))
            for value, _, aim in _results(row):
                aimed += aim is not None
                reached += aim is not None and value >= aim
        lines.append(cells)
    said = f"{reached} of {aimed} numbers with a target reach it."
    return "\n".join([where(rows), "", markdown(lines), "", said, _gpu(rows)])


def deployed_table(rows: Sequence[Row]) -> str:
    """Markdown: what the exported models of the page on deploying take."""
    found = _by_job(rows)
    lines = [["model", "runtime", "precision", "threads", "method", "dense ms", "ms", "speed-up"]]
    for job in jobs("cpu"):
        if job.model not in _ON_DEPLOY or job.mode not in ("onnxruntime", "openvino"):
            continue
        if job.align == 1 or job.batch > 1:
            continue
        for method, row in found.get(str(job), {}).items():
            if not ok(row) or row["method"] == "none":
                continue
            dense = row["bench"]["ms_dense"]["dense"]
            times = row["bench"]["speedup"]
            cells = [MODELS[job.model][2], job.mode, job.precision, str(job.threads), method]
            cells += [f"{dense:.1f}", f"{row['ms']:.1f}", f"{times:.2f}x"]
            lines.append(cells)
    if len(lines) == 1:
        return "No rows yet: `python -m benchmarks.speed --suite modes` writes them."
    return "\n".join([where(rows), "", markdown(lines)])


def points_table(rows: Sequence[Row]) -> str:
    """Markdown: speed-up over the dense model of every method at every cost in every mode.

    Every machine has a table of its own.

    Args:
        rows: Of the suite with `--fraction`, as they were appended.
    """
    rows = of_modes(rows)
    if not rows:
        return "No rows yet: `python -m benchmarks.speed --suite modes --fraction 0.5` writes them."
    machines = dict.fromkeys(machine_of(row) for row in rows)
    return "\n\n".join(_points([r for r in rows if machine_of(r) == name]) for name in machines)


def _points(rows: Sequence[Row]) -> str:
    found = _by_job(rows)
    known = {method for own in found.values() for method in own}
    methods = [method for method in METHODS if method in known]
    lines = [["model", "cost", "precision, mode", "batch", "threads", "dense ms", *methods]]
    costs = sorted({row["bench"].get("fraction", FRACTION) for row in rows})
    for job, cost in itertools.product(sorted(jobs("cpu"), key=_as_told), reversed(costs)):
        if (own := found.get(str(job._replace(fraction=cost)))) is None:
            continue
        dense = next((row["bench"]["ms_dense"] for row in own.values() if ok(row)), {})
        cells = [MODELS[job.model][2], f"{100 * cost:g} %", _kind(job)]
        cells += [str(job.batch), str(job.threads)]
        cells.append(f"{min(dense.values()):.1f}" if dense else "")
        lines.append(cells + [_times(own.get(method)) for method in methods])
    return "\n".join([where(rows), "", markdown(lines)])


def machine_of(row: Row) -> str:
    """The machine that a row was measured on, in words."""
    return in_words(row.get("machine") or {})


def _kind(job: Job) -> str:
    return f"{job.precision}, {job.mode}" + (f", {job.align}" if job.align > 1 else "")


def _as_told(job: Job) -> tuple[int, ...]:
    """Models, precisions, modes and batches in the order in which they are named."""
    names = (MODELS, job.model), (PRECISIONS, job.precision), (MODES, job.mode)
    return *(list(known).index(name) for known, name in names), job.align, job.batch, job.threads


def _times(row: Row | None) -> str:
    if row is None or out_of_reach(row):
        return ""  # as in the tables of accuracy, where a method cannot cost so little
    return f"{row['bench']['speedup']:.2f}x" if ok(row) else "failed"


def out_of_reach(row: Row) -> bool:
    """Whether the method cannot do what was asked for, which some older rows call a failure."""
    error = str(row.get("error"))
    older = error.startswith("UnreachableBudget") or error.endswith("use align=1")
    return row["status"] == "skipped" or older


def _by_job(rows: Sequence[Row]) -> dict[str, dict[str, Row]]:
    """The latest row of each method of each job."""
    found: dict[str, dict[str, Row]] = {}
    for row in of_modes(rows):
        name = row["bench"].get("control") or row["method"]
        found.setdefault(str(row["bench"]["job"]), {})[str(name)] = row
    return found


def ok(row: Row) -> bool:
    """Whether a row has a time."""
    return row.get("status") == "ok" and bool(row.get("imgs_per_s"))


def _results(row: Row | None) -> list[tuple[float, str, float | None]]:
    """Number, unit and target: efficiency with the same kernels, and times timm's speed."""
    if row is None or not ok(row):
        return []
    bench = row["bench"]
    found = [(bench["efficiency_by_dense"]["dense"], "", bench.get("target"))]
    if bench.get("speedup_over_timm"):
        found.append((bench["speedup_over_timm"], "x", bench.get("target_over_timm")))
    return found


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    if not ok(row):
        return "failed"
    return ", ".join(
        f"{value:.3f}{unit}"
        + ("" if aim is None else f" ({'≥' if value >= aim else '**<**'} {aim:.2f}{unit})")
        for value, unit, aim in _results(row)
    )


def where(rows: Sequence[Row]) -> str:
    """On which machine, and between which dates."""
    own = of_modes(rows)
    machines = dict.fromkeys(in_words(row["machine"]) for row in own if row.get("machine"))
    days = sorted({str(row["created"])[:10] for row in own})
    versions = own[-1].get("versions") or {}
    between = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    return f"On {'; '.join(machines)}; torch {versions.get('torch')}, {between}."


def _gpu(rows: Sequence[Row]) -> str:
    devices = dict.fromkeys(str(r["device"]) for r in of_modes(rows) if r["device"] != "cpu")
    return f"Rows of a GPU: {', '.join(devices) or 'none'}."
