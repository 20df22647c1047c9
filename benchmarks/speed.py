"""Speed of reducers against the dense model, in one process, in turns.

    python -m benchmarks.speed                          # DeiT-S, the usual methods, batch 16
    python -m benchmarks.speed --backbone deit_base --reducers tome,topk --batch 1 16 64
    python -m benchmarks.speed --mode training --batch 8 --linear auto
    python -m benchmarks.speed --device cuda --dtype float32 bfloat16 --cuda-graphs
    python -m benchmarks.speed --suite acceptance       # every target next to what was measured
    python -m benchmarks.speed --suite modes            # bfloat16, batch 1, compiled, exported

Dense is measured twice: timm's model untouched, and in this package's wrapper with the very kernels
and options that the reduced models get. Efficiency is (dense time / reduced time) over (dense GMACs
/ reduced GMACs), against the faster of the two; 1 means that the speed-up is all that the
arithmetic promises. Rows go to a `.jsonl` file in the schema of `zoo.results.rows`, with what it
lacks under `bench`.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import zoo
from benchmarks import tasks
from benchmarks.models import backbone_name, parse_schedule, plain_backbone, reduced, schedule_of
from benchmarks.timing import (
    Times,
    in_turns,
    is_out_of_memory,
    keep_pages,
    peak_memory,
    ratio,
    release,
)
from reduction.functional import kernels
from reduction.registry import METHODS
from zoo.adapters import fast_linear
from zoo.errors import UnreachableBudget, ZooError
from zoo.measure.describe import describe
from zoo.measure.device import pick_device
from zoo.model.reduced import ReducedViT
from zoo.model.runtime import Runtime
from zoo.report.readings import precision
from zoo.results.rows import append_row, new_row
from zoo.run.evaluate import count_costs

USUAL = (
    "tome,topk,evit,pitome,tofu,diffrate,token_pooling,dpcknn,patchmerger"  # those with a target
)
TIMM, DENSE = "timm", "dense"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line."""
    options = parser().parse_args(arguments)
    options.batch = [size for sizes in options.batch or () for size in sizes]
    options.methods = [] if options.reducers == USUAL else names_of(options.reducers)
    if options.allocator == "keep" and not keep_pages():
        print("this C library cannot be told to keep pages: --allocator default", file=sys.stderr)
        options.allocator = "default"
    try:
        if options.suite == "modes":
            from benchmarks import modes

            options.out = options.out or (modes.POINTS if options.fraction else modes.ROWS)
            return modes.run(options)
        options.batch, options.dtype = options.batch or [16], options.dtype or ["float32"]
        options.out = options.out or Path("results/local/speed.jsonl")
        pick_device(options.device, "--device")
        if "int8" in options.dtype:
            raise ZooError("--dtype int8 is for --suite modes, which quantises for OpenVINO")
        if options.suite:
            from benchmarks.acceptance import run

            return run(options)
        for backbone, dtype, batch in itertools.product(
            options.backbone, options.dtype, options.batch
        ):
            rows = measure(options, backbone, dtype, batch)
            print_table(rows)
            for row in rows:
                append_row(options.out, row)
    except ZooError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"rows: {options.out}")
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    usage = argparse.ArgumentParser(
        prog="python -m benchmarks.speed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = usage.add_argument
    add("--backbone", nargs="+", default=["deit_small"], help="timm names, deit_small, deit_base")
    add("--reducers", default=USUAL, help="names with commas, all, untrained, controls")
    add("--schedule", nargs="+", default=[], help="for all methods, e.g. constant_r:r=13")
    add("--batch", nargs="+", type=_numbers, help="16 if not given; 1 16 or 1,16")
    add("--mode", choices=("inference", "training"), default="inference")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", nargs="+", choices=(*tasks.DTYPES, "int8"), help="float32 if not given")
    add("--threads", type=int, default=None, help="CPU threads; torch's default if not given")
    add("--compile", action="store_true", help="torch.compile all models")
    add("--cuda-graphs", action="store_true", help="replay recorded graphs (inference on CUDA)")
    add("--bias", choices=("mask", "fold"), default="mask", help="form of log(size) in attention")
    add("--linear", choices=fast_linear.MODES, default="plain")
    add("--last-block", choices=("full", "class_token"), default="full")
    add("--rounds", type=int, default=9)
    add("--warmup", type=int, default=2)
    add("--min-time", type=float, default=0.2, help="seconds that a turn lasts at least")
    add("--allocator", choices=("keep", "default"), default="default", help="keep freed memory?")
    add("--no-memory", action="store_true", help="skip the peak memory")
    add("--quick", action="store_true", help="3 rounds, no memory; with a suite: DeiT-S only")
    add("--suite", choices=("acceptance", "modes"))
    add("--out", type=Path, help="file of rows; results/local/speed.jsonl, of modes its own")
    modes = usage.add_argument_group("of the suite modes")
    modes.add_argument("--only", help="backbones with commas, e.g. deit_small,dinov2_small_518")
    modes.add_argument("--modes", help="with commas: eager, aligned, compile, onnxruntime, ...")
    modes.add_argument("--fraction", type=float, nargs="+", help="of the dense GMACs; 0.6")
    modes.add_argument("--minutes", type=float, help="begin no job that would end later")
    modes.add_argument("--job-seconds", type=float, default=40, help="what rounds are fitted to")
    modes.add_argument("--list", action="store_true", help="say what is left, and do nothing")
    return usage


def names_of(text: str) -> list[str]:
    """Methods by what `--reducers` says, and those that need no training for "untrained" in it."""
    groups = {
        "all": zoo.list_methods(),
        "untrained": [name for name in METHODS.names() if not METHODS.get(name).card.trained],
    }
    found = (groups.get(part, [part]) for part in text.split(","))
    # "controls" is known to the suite of modes alone; as a method it is none.
    return list(dict.fromkeys(itertools.chain.from_iterable(found)))


def _numbers(text: str) -> list[int]:
    found = [int(part) for part in text.split(",") if part]
    if not found or min(found) < 1:
        raise ValueError
    return found


def measure(
    options: argparse.Namespace, backbone: str, dtype: str, batch: int
) -> list[dict[str, Any]]:
    """Time all methods on one backbone at one batch size.

    Returns:
        One row per method and schedule, the dense model first; failures are rows too.
    """
    device = torch.device(options.device)
    if options.threads:
        torch.set_num_threads(options.threads)
    with kernels.forced("fold" if options.bias == "fold" else None):
        while True:
            try:
                return _measure(options, backbone, dtype, batch, device)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or batch == 1:
                    raise
                print(f"batch {batch} does not fit into memory, trying {batch // 2}")
                batch //= 2
                release(device)


def _measure(
    options: argparse.Namespace, backbone: str, dtype: str, batch: int, device: torch.device
) -> list[dict[str, Any]]:
    runtime = {"linear": options.linear, "last_block": options.last_block}
    models, broken = build(options, backbone, runtime)
    size = models[DENSE].backbone.patch_embed.img_size
    images = torch.randn(batch, 3, *size, device=device)
    steps = {}
    for name, model in models.items():
        model.to(device)
        runner: Any = torch.compile(model) if options.compile else model
        kind = tasks.DTYPES[dtype]
        if options.mode == "training":
            steps[name] = tasks.training(runner, images, kind)
        elif options.cuda_graphs:
            steps[name] = tasks.cuda_graph(runner, images, kind)
        else:
            steps[name] = tasks.inference(runner, images, kind)
    rounds = 3 if options.quick else options.rounds
    times = in_turns(steps, device, rounds, options.warmup, options.min_time, beside=DENSE)
    memory = {}
    if not (options.quick or options.no_memory):
        memory = {n: peak_memory(steps[n], device) for n in steps if not times[n].error}
    common = {
        "batch": batch,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "dtype": dtype,
        "compile": options.compile,
        "seed": 0,
    }
    settings = {
        "mode": options.mode,
        "rounds": rounds,
        "warmup": options.warmup,
        "cuda_graphs": options.cuda_graphs,
        "bias": options.bias,
        "allocator": options.allocator,
    }
    rows = [
        make_row(name, model, times, memory, common, settings)
        for name, model in models.items()
        if name != TIMM
    ]
    own = {"backbone": backbone_name(backbone), **common}
    rows += [new_row(status=status_of(e), error=str(e), method=n, **own) for n, e in broken.items()]
    return rows


def status_of(error: Exception) -> str:
    """Of a row without a time: as in a sweep of `eval.py`, a budget out of reach is no failure."""
    return "skipped" if isinstance(error, UnreachableBudget) else "failed"


def build(
    options: argparse.Namespace, backbone: str, runtime: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Exception]]:
    """Models by name, and the errors of those that cannot be built."""
    names = names_of(options.reducers)
    shared = options.mode == "inference"  # training changes weights, so everyone gets their own
    plain = plain_backbone(backbone)

    def own() -> nn.Module:
        return plain if shared else plain_backbone(backbone)

    models: dict[str, Any] = {TIMM: own(), DENSE: reduced(own(), None, own_kernels=True, **runtime)}
    broken: dict[str, Exception] = {}
    for name in (n for n in names if n not in ("none", "")):
        given = [parse_schedule(s) for s in options.schedule]
        for schedule in given or [schedule_of(name, backbone_name(backbone))]:
            label = name if len(given) < 2 else f"{name} {_short(schedule)}"
            try:
                models[label] = reduced(own(), name, schedule, **runtime)
            except (ZooError, ValueError, RuntimeError) as error:
                broken[label] = error
    return models, broken


def faster_dense(times: Mapping[str, Times]) -> str:
    """Which of the two dense models is the faster one, of those that ran."""
    if TIMM in times and DENSE in times:
        return TIMM if ratio(times[TIMM], times[DENSE]) < 1 else DENSE
    return next(iter(times))


def make_row(
    name: str,
    model: ReducedViT,
    times: dict[str, Times],
    memory: dict[str, float],
    common: dict[str, Any],
    settings: dict[str, Any],
) -> dict[str, Any]:
    """The row of one model."""
    row = {**describe(model), **count_costs(model, trace=False), **common, "task": ["throughput"]}
    row["runtime"] = {
        k: v
        for k, v in model.runtime._asdict().items()
        if v != Runtime._field_defaults[k] and k != "own_kernels"
    } or None
    own = times[name]
    if own.error:
        return new_row(**row, status="failed", error=own.error, bench=settings)
    against = {n: times[n] for n in (TIMM, DENSE) if n in times and not times[n].error}
    fastest = faster_dense(against)
    saved = row["gmacs_dense"] / row["gmacs"]["total"]
    if name == DENSE:
        saved = 1.0
    bench = {
        **settings,
        "spread": own.spread,
        "ms_min": 1e3 * min(own.seconds),
        "efficiency": ratio(against[fastest], own) / saved,
        "efficiency_by_dense": {n: ratio(t, own) / saved for n, t in against.items()},
        "speedup": ratio(against[fastest], own),
        "speedup_over_timm": ratio(against[TIMM], own) if TIMM in against else None,
        "ms_dense": {n: 1e3 * t.median for n, t in against.items()},
        "attention": {str(k): v for k, v in kernels.choices().items()} or None,
        "linear": fast_linear.chosen() or None,
    }
    return new_row(
        **row,
        ms=1e3 * own.median,
        imgs_per_s=row["batch"] / own.median,
        imgs_per_s_dense=row["batch"] / against[fastest].median,
        peak_mem_mb=memory.get(name),
        peak_mem_mb_dense=memory.get(DENSE),
        bench=bench,
    )


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """Print rows of one run."""
    first = rows[0]
    settings = first["bench"]
    options = ", ".join(f"{k}={v}" for k, v in (first["runtime"] or {}).items())
    print(
        f"\n{first['backbone']}, {settings['mode']}, batch {first['batch']}, {precision(first)}, "
        f"{first['device']}, {first['threads']} threads, {settings['rounds']} rounds"
        + (", compiled" if first["compile"] else "")
        + (f", {engine}" if (engine := first["engine"]) not in (None, "torch") else "")
        + (f", {options}" if options else "")
    )
    for name, ms in settings.get("ms_dense", {}).items():
        print(f"  {name}: {ms:.1f} ms")
    head = ("method", "schedule", "GMACs", "ms", "spread", "img/s", "speed-up", "efficiency", "MiB")
    lines = [head] + [_line(row) for row in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    for line in lines:
        cells = (f"{cell:>{w}}" for cell, w in zip(line[2:], widths[2:], strict=True))
        print(f"  {line[0]:<{widths[0]}}  {line[1]:<{widths[1]}}  " + "  ".join(cells))


def _line(row: dict[str, Any]) -> tuple[str, ...]:
    name = (row["bench"] or {}).get("control") or row["method"]
    schedule = _short(row["schedule"])
    if row["status"] != "ok":
        return (name, schedule, "", "", "", "", "", "", f"{row['status']}: {row['error']}")
    b, memory = row["bench"], row["peak_mem_mb"]
    return (
        name,
        schedule,
        f"{row['gmacs']['total']:.3f}",
        f"{row['ms']:.1f}",
        f"{100 * b['spread']:.0f} %",
        f"{row['imgs_per_s']:.1f}",
        f"{b['speedup']:.3f}",
        f"{b['efficiency']:.3f}",
        "" if memory is None else f"{memory:.1f}",
    )


def _short(schedule: dict[str, Any] | None) -> str:
    if not schedule:
        return ""
    shown = {"r", "rate", "blocks", "gmacs", "fraction"} & set(schedule)
    return " ".join([schedule["name"], *(f"{k}={schedule[k]}" for k in sorted(shown))])


if __name__ == "__main__":
    sys.exit(main())
