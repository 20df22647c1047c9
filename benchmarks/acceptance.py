"""Every target for speed and memory next to what was measured, in one run.

A target is met or missed; a miss is explained by the profiles of docs/performance.md. All
candidates of a line took turns in this process. Dense is always the faster one of timm's untouched
model and the same model with the kernels that the reduced ones get.
"""

from __future__ import annotations

import argparse
import time
from typing import Any, NamedTuple

import torch

from benchmarks import reference, tasks
from benchmarks.models import backbone_name, plain_backbone, reduced, schedule_of
from benchmarks.speed import DENSE, TIMM, faster_dense, make_row
from benchmarks.timing import Times, in_turns, peak_memory, ratio, release
from reduction.functional import clustering
from zoo.model.reduced import ReducedViT
from zoo.results.rows import append_row

CPU = torch.device("cpu")
SMALL, BASE = "deit_small", "deit_base"
METHODS = tuple(reference.METHODS)
_HIGH, _LOW = 0.97, 0.9
AT_16 = dict.fromkeys(METHODS, _HIGH) | dict.fromkeys(("tome", "topk"), 1.0)
AT_16 |= dict.fromkeys(("token_pooling", "dpcknn", "patchmerger"), _LOW)
AT_1 = dict.fromkeys(METHODS, 0.86) | dict.fromkeys(("topk", "evit"), 0.92)


class Line(NamedTuple):
    """One target.

    Attributes:
        what: What was measured.
        value: The number found.
        target: What it is compared with.
        at_most: Whether less is better.
        note: Anything else.
    """

    what: str
    value: float
    target: float
    at_most: bool = False
    note: str = ""

    @property
    def met(self) -> bool:
        """Whether the target is reached."""
        return self.value <= self.target if self.at_most else self.value >= self.target

    def __str__(self) -> str:
        sign, word = ("<=" if self.at_most else ">="), ("met" if self.met else "MISSED")
        value = f"{self.value:.3f}" if self.target > 1e-3 else f"{self.value:.1e}"
        return f"{self.what:<62} {value:>8}  {sign} {self.target:<6g} {word:<7}{self.note}"


class Suite:
    """Runs the parts and collects lines and rows."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.quick: bool = options.quick
        self.rounds = 3 if self.quick else max(7, options.rounds)
        self.lines: list[Line] = []

    def add(self, *line: Any, **more: Any) -> None:
        """Note a line and print it."""
        self.lines.append(Line(*line, **more))
        print(self.lines[-1], flush=True)

    def rounds_at(self, batch: int) -> int:
        """Rounds for a batch size: a single image is over sooner and disturbed more easily."""
        return self.rounds * (3 if batch == 1 and not self.quick else 1)

    def turns(
        self, steps: dict[str, Any], beside: str = DENSE, batch: int = 16
    ) -> dict[str, Times]:
        """Time candidates; all must run."""
        rounds = self.rounds_at(batch)
        found = in_turns(steps, CPU, rounds, warmup=1, min_time=0.2, beside=beside)
        for name, times in found.items():
            if times.error:
                raise RuntimeError(f"{name}: {times.error}")
        return found

    def write(
        self,
        models: dict[str, ReducedViT],
        times: dict[str, Times],
        images: torch.Tensor,
        memory: dict[str, float] | None = None,
        mode: str = "inference",
    ) -> None:
        """Append the rows of a part."""
        common = {"batch": images.shape[0], "threads": torch.get_num_threads(), "device": "cpu"}
        common |= {"dtype": "float32", "compile": False, "seed": 0}
        settings = {"mode": mode, "rounds": self.rounds_at(images.shape[0]), "warmup": 1}
        settings |= {"suite": "acceptance", "allocator": self.options.allocator}
        for name, model in models.items():
            row = make_row(name, model, times, memory or {}, common, settings)
            plain = times.get(f"plain {name}")
            if plain is not None:
                row["bench"]["over_straightforward"] = ratio(plain, times[name])
            append_row(self.options.out, row)


def run(options: argparse.Namespace) -> int:
    """Measure everything, print the verdicts, write the rows."""
    torch.set_num_threads(options.threads or 2)
    print(f"{torch.get_num_threads()} threads, float32, 224 px, torch {torch.__version__}")
    suite, start = Suite(options), time.time()
    for backbone in (SMALL,) if options.quick else (SMALL, BASE):
        for batch in (16, 1):
            inference(suite, backbone, batch, plainly=backbone == SMALL)
    medoids(suite)
    for batch in (8,) if options.quick else (8, 16):
        training(suite, batch)
    search(suite)
    runtime_options(suite, 16)
    if not options.quick:
        runtime_options(suite, 1)
    missed = [line for line in suite.lines if not line.met]
    print(f"\n{len(suite.lines) - len(missed)} of {len(suite.lines)} targets met", end="; ")
    print(f"{(time.time() - start) / 60:.1f} minutes; rows: {options.out}")
    for line in missed:
        print(line)
    return 0


def inference(suite: Suite, backbone: str, batch: int, plainly: bool) -> None:
    """Efficiency, the straightforward forms, the wrapper alone, peak memory."""
    print(f"\n== {backbone}, inference, batch {batch}, {suite.rounds_at(batch)} rounds", flush=True)
    plain = plain_backbone(backbone)
    images = torch.randn(batch, 3, 224, 224)
    models = {DENSE: reduced(plain, None, own_kernels=True)}
    for name in METHODS:
        models[name] = reduced(plain, name, schedule_of(name, backbone_name(backbone)))
    idle = ("wrapper", "wrapper, keep 1.0") if plainly else ()
    steps = {DENSE: tasks.inference(models[DENSE], images), TIMM: tasks.inference(plain, images)}
    if plainly:
        steps["wrapper"] = tasks.inference(reduced(plain, None), images)
    for name in METHODS:
        steps[name] = tasks.inference(models[name], images)
        if plainly:  # the pair of every round
            other = reference.straightforward(models[name])
            with torch.inference_mode():
                gap = (models[name](images[:2]) - other(images[:2])).abs().max().item()
            suite.add(f"{name}: difference to the straightforward form", gap, 1e-5, at_most=True)
            steps[f"plain {name}"] = tasks.inference(other, images)
    if plainly:
        everything = reduced(plain, "topk", {"name": "keep_rate", "rate": 1.0})
        steps["wrapper, keep 1.0"] = tasks.inference(everything, images)
    for name in (DENSE, *METHODS) if batch == 1 else ():
        steps[f"products {name}"] = tasks.linear_layers(models[name], batch)
    times = suite.turns(steps, batch=batch)
    dense = faster_dense({n: times[n] for n in (TIMM, DENSE)})
    whole = _gmacs(models[DENSE])
    place = f"{backbone} b{batch}"
    print(f"timm {_ms(times[TIMM])}, dense with our kernels {_ms(times[DENSE])}; compared: {dense}")
    targets = AT_16 if batch > 1 else AT_1
    for name in METHODS:
        saved = whole / _gmacs(models[name])
        note = f"{_ms(times[name])}, {_gmacs(models[name]):.3f} GMACs"
        alone = times.get(f"products {name}")
        if alone is not None:
            ceiling = ratio(times[f"products {DENSE}"], alone)
            ceiling /= _products(models[DENSE]) / _products(models[name])
            note += f"; linear layers alone {ceiling:.3f}"
        suite.add(
            f"{place} {name}: efficiency",
            ratio(times[dense], times[name]) / saved,
            targets[name],
            note=f"{note}; by medians {times[dense].median / times[name].median / saved:.3f}",
        )
    for name in METHODS if plainly else ():
        value = ratio(times[f"plain {name}"], times[name])
        suite.add(f"{place} {name}: over the straightforward form", value, 1.05)
    for name in idle:
        suite.add(f"{place} {name} / timm", ratio(times[name], times[TIMM]), 1.01, at_most=True)
    memory = {}
    if batch > 1:
        memory = {n: peak_memory(steps[n], CPU) for n in (TIMM, *models)}
        held = memory[TIMM]
        for name in METHODS:
            note = f"{memory[name]:.1f} of {held:.1f} MiB"
            suite.add(
                f"{place} {name}: peak memory / dense",
                memory[name] / held,
                1.0,
                at_most=True,
                note=note,
            )
    suite.write(models, times, images, memory)
    release(CPU)


def medoids(suite: Suite) -> None:
    """K-Medoids against the loop over clusters, on the sizes of three stages."""
    print("\n== K-Medoids, batch 16, 384 features", flush=True)
    for n, k in ((196, 137), (137, 96), (96, 67)):
        x, weight = torch.randn(16, n, 384), torch.rand(16, n) + 0.1
        distance = clustering.squared_distances(x)
        first = clustering.heaviest(weight, k)
        steps = {
            "fast": lambda d=distance, f=first, w=weight: clustering.kmedoids(d, f, w, 5),
            "loop": lambda d=distance, f=first, w=weight: reference.kmedoids(d, f, w, 5),
        }
        same = torch.equal(steps["fast"]().leader, steps["loop"]()[0])
        times = suite.turns(steps, beside="fast")
        note = f"{_ms(times['fast'])} against {_ms(times['loop'])}, same medoids: {same}"
        value = ratio(times["loop"], times["fast"])
        suite.add(f"K-Medoids {n} -> {k}: over the loop", value, 2.5, note=note)


def training(suite: Suite, batch: int) -> None:
    """One optimisation step against dense."""
    print(f"\n== {SMALL}, training step, batch {batch}, {suite.rounds} rounds", flush=True)
    images = torch.randn(batch, 3, 224, 224)
    models = {DENSE: reduced(plain_backbone(SMALL), None, own_kernels=True)}
    for name in ("tome", "topk"):
        own = plain_backbone(SMALL)
        models[name] = reduced(own, name, schedule_of(name, backbone_name(SMALL)))
    steps = {TIMM: tasks.training(plain_backbone(SMALL), images)}
    steps |= {n: tasks.training(m, images) for n, m in models.items()}
    times = suite.turns(steps)
    dense = faster_dense({n: times[n] for n in (TIMM, DENSE)})
    print(f"timm {_ms(times[TIMM])}, dense with our kernels {_ms(times[DENSE])}; compared: {dense}")
    for name in ("tome", "topk"):
        saved = _gmacs(models[DENSE]) / _gmacs(models[name])
        value = ratio(times[dense], times[name]) / saved
        suite.add(
            f"{SMALL} b{batch} {name}: training efficiency", value, 0.95, note=_ms(times[name])
        )
    suite.write(models, times, images, mode="training")
    release(CPU)


def search(suite: Suite) -> None:
    """A step of DiffRate's search in units of dense inference."""
    print(f"\n== {SMALL}, step of DiffRate's search, batch 8", flush=True)
    images = torch.randn(8, 3, 224, 224)
    plain = plain_backbone(SMALL)
    steps = {TIMM: tasks.inference(plain, images)}
    for mode in ("plain", "auto"):
        m = reduced(plain_backbone(SMALL), "diffrate", {"name": "constant_r", "r": 13})
        steps[mode] = tasks.diffrate_search(m.set_runtime(linear=mode), images)
    times = suite.turns(steps, beside=TIMM)
    for mode, target in (("plain", 2.1), ("auto", 1.3)):
        what = "search step / dense inference" + ("" if mode == "plain" else ", linear=auto")
        value = ratio(times[mode], times[TIMM])
        suite.add(what, value, target, at_most=True, note=_ms(times[mode]))


def runtime_options(suite: Suite, batch: int) -> None:
    """The run-time options, dense given the same; no targets, rows of their own."""
    print(f"\n== {SMALL}, run-time options, batch {batch}; dense has the same options", flush=True)
    images = torch.randn(batch, 3, 224, 224)
    plain = plain_backbone(SMALL)
    groups: dict[str, dict[str, Any]] = {
        "none": {},
        "last_block=class_token": {"last_block": "class_token"},
        "linear=auto": {"linear": "auto"},
        "both": {"last_block": "class_token", "linear": "auto"},
    }
    # The arithmetic is that of the full blocks on both sides, whatever the options.
    schedules = {n: schedule_of(n, backbone_name(SMALL)) for n in ("tome", "topk")}
    whole = _gmacs(reduced(plain, None))
    saved = {n: whole / _gmacs(reduced(plain, n, s)) for n, s in schedules.items()}
    for label, options in groups.items():
        models = {DENSE: reduced(plain, None, own_kernels=True, **options)}
        models |= {n: reduced(plain, n, s, **options) for n, s in schedules.items()}
        steps = {TIMM: tasks.inference(plain, images)}
        steps |= {n: tasks.inference(m, images) for n, m in models.items()}
        times = suite.turns(steps, batch=batch)
        for name in schedules:
            same = ratio(times[DENSE], times[name]) / saved[name]
            print(
                f"{label:<24} {name:<6} {_ms(times[name]):>20}  efficiency, same options: "
                f"{same:.3f}  speed-up over untouched timm: {ratio(times[TIMM], times[name]):.3f}"
            )
        print(
            f"{label:<24} dense  {_ms(times[DENSE]):>20}{'':<34}"
            f"speed-up over untouched timm: {ratio(times[TIMM], times[DENSE]):.3f}"
        )
        if label != "none":
            suite.write(models, times, images)


def _products(model: ReducedViT) -> float:
    """Multiply-accumulates of the linear layers of the blocks."""
    import zoo

    return float(sum(b.linear + b.mlp for b in zoo.profile(model).blocks))


def _gmacs(model: ReducedViT) -> float:
    import zoo

    return zoo.profile(model).gmacs


def _ms(times: Times) -> str:
    return f"{1e3 * times.median:.1f} ms (+-{100 * times.spread:.0f} %)"
