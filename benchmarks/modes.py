"""The suite `modes`: reducers in the modes that people run, against dense in the same mode.

    python -m benchmarks.speed --suite modes                    # all jobs; again: those left
    python -m benchmarks.speed --suite modes --minutes 25
    python -m benchmarks.speed --suite modes --only deit_small,dinov2_small_518 --batch 1,16
    python -m benchmarks.speed --suite modes --only deit_small --modes aligned,onnxruntime --list

A job is one backbone in one mode, precision, batch size and number of threads, with all methods at
0.6 of the dense GMACs (`--fraction` asks for another part). Its rows are written when it ends, and
a job that has rows of all these methods from such a machine is not done again. The jobs with a
target come first. `--reducers controls` measures what methods compete with, smaller images and a
smaller model.
"""

from __future__ import annotations

import argparse
import copy
import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import zoo
from benchmarks import jobs as suite
from benchmarks import tasks
from benchmarks.jobs import (
    CONTROLS,
    METHODS,
    MODELS,
    MODES,
    PRECISIONS,
    Job,
    target,
    target_over_timm,
)
from benchmarks.models import controls, plain_backbone, reduced
from benchmarks.modes_table import machine_of
from benchmarks.speed import DENSE, TIMM, make_row, print_table, status_of
from benchmarks.timing import Step, in_turns, is_out_of_memory, release
from zoo.errors import NoClassToken, ZooError
from zoo.measure.describe import describe
from zoo.measure.device import pick_device
from zoo.measure.engines import EXPORTED, Engine, Graphs
from zoo.measure.machine import in_words, machine
from zoo.model.reduced import ReducedViT
from zoo.results.rows import append_row, new_row, readable_rows
from zoo.run.evaluate import count_costs

ROWS = Path("results/speed/modes.jsonl")
POINTS = Path("results/speed/points.jsonl")  # at the costs of docs/leaderboard.md


def run(options: argparse.Namespace) -> int:
    """Do what is left; returns the exit code.

    Raises:
        ZooError: If there is no such device, or the command line names what is not known.
    """
    device = str(options.device)
    pick_device(device, "--device")
    if wrong := [part for part in options.fraction or () if not 0 < part < 1]:
        raise ZooError(f"--fraction {wrong[0]:g}: expected numbers between 0 and 1")
    asked = select(suite.jobs(device), options)
    chosen = [
        job._replace(fraction=part)
        for part in options.fraction or [suite.FRACTION]
        for job in asked
    ]
    done = done_jobs(options.out, options.methods or METHODS)
    left = together([job for job in chosen if str(job) not in done])
    print(f"{in_words(machine())}; {len(chosen)} jobs, {len(chosen) - len(left)} done before")
    if options.list:
        print("\n".join(f"left: {job}" for job in left))
        return 0
    end = time.monotonic() + 60 * options.minutes if options.minutes else float("inf")
    bench, longest = Bench(options), 0.0
    while left and time.monotonic() + longest < end:
        job = left.pop(0)
        start = time.monotonic()
        rows = bench.rows(job)
        print_table(rows)
        for row in rows:
            append_row(options.out, row)
        took = time.monotonic() - start
        longest = max(took, 0.8 * longest)  # the next one may take as long
        print(f"{job}: {took:.0f} s; {len(left)} left", flush=True)
    print("\n".join(f"left: {job}" for job in left) or "nothing is left")
    table = "leaderboard" if options.fraction else f"table {options.out}"
    print(f"rows: {options.out}; python -m benchmarks.{table} --write")
    return 0


def select(found: Sequence[Job], options: argparse.Namespace) -> list[Job]:
    """The jobs that the command line asks for.

    Raises:
        ZooError: A name is none, or nothing is left of all.
    """
    wanted = {
        "model": ("--only", _names("--only", options.only, MODELS)),
        "mode": ("--modes", _names("--modes", options.modes, MODES)),
        "precision": ("--dtype", set(options.dtype or PRECISIONS)),
        "batch": ("--batch", set(options.batch or (1, 16))),
        "threads": ("--threads", {options.threads} if options.threads else {1, 2}),
    }
    kept = [job for job in found if all(getattr(job, k) in v for k, (_, v) in wanted.items())]
    if not kept:
        raise ZooError(
            "no job of the suite is all of that; batches are 1 and 16, threads 1 and 2, "
            "bfloat16 is not for onnxruntime, int8 for openvino alone, and CUDA knows eager, "
            "aligned, compile and graphs"
        )
    return kept


def _names(option: str, given: str | None, known: Mapping[str, Any]) -> set[str]:
    names = set(given.split(",")) if given else set(known)
    if unknown := sorted(names - set(known)):
        raise ZooError(f"{option} {unknown[0]}: expected one of {', '.join(known)}")
    return names


def done_jobs(path: Path, methods: Sequence[str] = ()) -> set[str]:
    """Jobs whose rows, of all these methods on a machine like this one, are in a file already."""
    rows = readable_rows([path]) if Path(path).is_file() else []
    here = in_words(machine())
    found: dict[str, set[str]] = {}
    for row in rows:
        if machine_of(row) == here:
            bench = row.get("bench") or {}
            name = CONTROLS if bench.get("control") else row["method"]
            found.setdefault(str(bench.get("job")), set()).add(name)
    # Where not even the dense model fits into memory, no method has a row.
    return {j for j, known in found.items() if known == {"none"} or known.issuperset(methods)}


def together(found: Sequence[Job]) -> list[Job]:
    """Jobs in their order, but those that run the same models right behind the first of them."""
    groups: dict[Job, dict[Job, list[Job]]] = {}
    for job in found:
        groups.setdefault(_models_of(job), {}).setdefault(_run_of(job), []).append(job)
    return [job for group in groups.values() for own in group.values() for job in own]


def _models_of(job: Job) -> Job:
    """What two jobs have in common that run the same models; exported ones the same graphs."""
    alike = _run_of(job)
    if MODES[job.mode][0] in EXPORTED:  # in whatever engine, precision and number of threads
        alike = alike._replace(mode="", precision="", threads=0)
    return alike


def _run_of(job: Job) -> Job:
    """What two jobs have in common whose models stay opened, or compiled, in between."""
    return job._replace(batch=0)


class Bench:
    """Builds models once for as many jobs as follow each other with the same ones.

    Args:
        options: Of the command line.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self._ready: Job | None = None
        self._running: Job | None = None
        self._models: dict[str, ReducedViT] = {}
        self._controls: frozenset[str] = frozenset()
        self._broken: dict[str, Exception] = {}
        self._engine: Engine | None = None
        self._graphs = Graphs()

    def rows(self, job: Job) -> list[dict[str, Any]]:
        """Does one job.

        Returns:
            One row per method, the dense model first; failures are rows, too.
        """
        device = torch.device(job.device)
        if job.device == "cpu":
            torch.set_num_threads(job.threads)
        exported = MODES[job.mode][0] in EXPORTED
        if self._ready != (alike := _models_of(job)):
            self._prepare(job, device, exported)
            self._ready = alike
        if self._running != (running := _run_of(job)):
            self._engine = None  # what it opened has gone before the next one opens
            precision = job.precision if exported else None
            self._engine = Engine(
                MODES[job.mode][0], device, threads=job.threads, precision=precision,
                graphs=self._graphs, option="--modes",
            )  # fmt: skip
            self._running = running
        steps = dict(self._steps(job, device))
        batch = job.batch
        rounds = self._rounds(steps)
        try:
            times = in_turns(
                steps, device, rounds, warmup=1, min_time=self.options.min_time, beside=DENSE
            )
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            release(device)
            failed = "does not fit into memory"
            return [new_row(status="failed", error=failed, method="none", bench={"job": str(job)})]
        if exported:
            times[TIMM] = times[DENSE]  # one graph
        half = job.precision == "bfloat16"
        common = {
            "batch": batch,
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "dtype": "int8" if job.precision == "int8" else "float32",
            "weights_dtype": "bfloat16" if half else None,
            "compile": False,
            "engine": MODES[job.mode][0],
            "machine": machine(),
            "seed": 0,
        }
        settings = {
            "suite": "modes",
            "job": str(job),
            **job._asdict(),
            "mode": "inference",
            "kind": job.mode,
            "rounds": rounds,
            "cuda_graphs": job.mode == "graphs",
        }
        found = []
        for name, model in self._models.items():
            if name == TIMM:
                continue
            aims = {
                "target": target(job, name), "target_over_timm": target_over_timm(job, name)
            }  # fmt: skip
            row = make_row(name, model, times, {}, common, settings | aims)
            if (own := times[name]).cpu:
                row["cpu_ms"] = 1e3 * sorted(own.cpu)[len(own.cpu) // 2]
            if TIMM in times and not times[TIMM].error:
                row["imgs_per_s_timm"] = batch / times[TIMM].median
            if DENSE in times and not times[DENSE].error:
                row["imgs_per_s_dense"] = batch / times[DENSE].median
            if name in self._controls:
                _as_control(row, name, count_costs(self._models[DENSE], trace=False))
            if self._engine is not None and self._engine.version is not None:
                row["kernels"] = {self._engine.name: self._engine.version}
            found.append(row)
        dense = describe(self._models[DENSE])
        for name, error in self._broken.items():
            text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            row = {"method": name, "backbone": dense["backbone"], "img_size": dense["img_size"]}
            row["status"] = status_of(error)
            found.append(new_row(error=text, **row, **common, bench=settings))
        return found

    def _prepare(self, job: Job, device: torch.device, exported: bool) -> None:
        self._models, self._broken, self._engine, self._running = {}, {}, None, None
        self._graphs = Graphs()
        gc.collect()
        name, arguments, _ = MODELS[job.model]
        half = job.precision == "bfloat16" and not exported  # there the runtime casts
        kind = torch.bfloat16 if half else torch.float32
        plain = plain_backbone(name, **arguments)
        runtime = {"linear": "packed"} if job.packed else {}
        self._models = {
            TIMM: plain, DENSE: reduced(copy.deepcopy(plain), None, own_kernels=True, **runtime)
        }  # fmt: skip
        # timm's own model stays as timm makes it; the others share one set of weights.
        shared = self._models[DENSE].backbone
        methods = list(self.options.methods or METHODS)
        self._controls = frozenset()
        if CONTROLS in methods:
            methods.remove(CONTROLS)
            smaller = controls(name, arguments, job.fraction)
            self._controls = frozenset(smaller)
            for label, backbone in smaller.items():
                self._models[label] = reduced(backbone, None, own_kernels=True, **runtime)
        for method in methods:
            schedule = {"name": "target_gmacs", "fraction": job.fraction, "align": job.align}
            try:
                self._models[method] = _with_method(shared, method, schedule, runtime)
            except (ZooError, ValueError, RuntimeError) as error:
                self._broken[method] = error
        for model in self._models.values():
            model.to(device=device, dtype=kind).eval()
        if exported:
            del self._models[TIMM]  # its graph would be that of the dense model

    def _steps(self, job: Job, device: torch.device) -> Iterator[tuple[str, Step]]:
        """Candidates that can be run; the others are noted as broken."""
        assert self._engine is not None
        for name, model in list(self._models.items()):
            like = self._models[DENSE if name == TIMM else name]
            size = like.tower.input_size(like.backbone)
            images = torch.randn(job.batch, *size, device=device)
            exported = self._engine.name in EXPORTED and name in (DENSE, *self._controls)
            runner: nn.Module = model.unwrap() if exported else model
            try:
                if job.mode == "graphs":
                    kind = next(runner.parameters()).dtype
                    yield name, tasks.cuda_graph(runner, images.to(kind))
                else:
                    yield name, _without_gradients(self._engine.start(runner), images)
            except ZooError as error:
                if name == DENSE:
                    raise
                self._broken[name] = error
                del self._models[name]

    def _rounds(self, steps: Mapping[str, Step]) -> int:
        """As many as fit into the seconds of a job, and three at least."""
        steps[DENSE]()
        start = time.perf_counter()
        steps[DENSE]()
        once = time.perf_counter() - start
        turns = 1.5 * len(steps) * (once + max(once, self.options.min_time))
        return max(3, min(self.options.rounds, int(self.options.job_seconds / turns)))


def _with_method(
    backbone: nn.Module, method: str, schedule: Mapping[str, Any], runtime: Mapping[str, Any]
) -> ReducedViT:
    """A model with a method; without class token it ranks as it does there."""
    try:
        return reduced(backbone, method, schedule, **runtime)
    except NoClassToken as error:
        if not error.instead:
            raise
        spec = {"name": method, **error.instead}
        return zoo.wrap(backbone, spec, schedule).eval().set_runtime(**runtime)


def _as_control(row: dict[str, Any], name: str, dense: Mapping[str, Any]) -> None:
    """Says in a row that it is of a control, and of which model it takes the place."""
    bench, own = row["bench"], row["gmacs_dense"]
    bench["control"], row["gmacs_dense"] = name, dense["gmacs"]["total"]
    if "efficiency" in bench:
        part = own / row["gmacs_dense"]
        by_dense = {k: v * part for k, v in bench["efficiency_by_dense"].items()}
        bench.update(efficiency=bench["efficiency"] * part, efficiency_by_dense=by_dense)


def _without_gradients(start: Callable[[Tensor], Step], images: Tensor) -> Step:
    step = start(images)

    def inner() -> object:
        with torch.inference_mode():
            return step()

    return inner
