"""Where the time of a forward pass goes, and which part keeps a method from its promise.

    python -m benchmarks.breakdown [--batch 16 1] [--reducers tome,topk] [--backbone deit_small]
    python -m benchmarks.breakdown --mode training --batch 8 --reducers tome,topk

Every operation belongs to one part. `excess` is what a part takes beyond (dense time of the part)
/ (dense GMACs / reduced GMACs), in percent of the dense model's whole time over that ratio: the sum
over the parts is what separates the efficiency from 1. Recording costs time too, most where
operations are small, so the efficiency here is lower than that of `benchmarks.speed`; what matters
is the shares. Dense has the kernels of the reduced models. A training step is divided into forward
pass, backward pass and optimiser, by the clock alone.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

import zoo
from benchmarks import tasks
from benchmarks.models import backbone_name, plain_backbone, reduced, schedule_of
from benchmarks.speed import DENSE
from benchmarks.timing import Step, keep_pages
from reduction import create_reducer, list_methods
from reduction.base import Reducer
from reduction.functional import kernels
from reduction.functional.attention import signals
from zoo.adapters.attention import run_attention

BETWEEN = "between operations"
PARTS = (
    *("linear layers", "attention", "reducer", "norm, activation", "embedding", "other"),
    BETWEEN,
)
TRAINING = ("forward", "backward", "optimiser")
_NAMES = {
    "aten::addmm": "linear layers",
    "aten::native_layer_norm": "norm, activation",
    "aten::gelu": "norm, activation",
    "aten::gelu_": "norm, activation",
    "aten::mkldnn_convolution": "embedding",
}
_MARK = "part: "


@contextlib.contextmanager
def marked() -> Iterator[None]:
    """Within, what runs inside attention and reducers is recorded under their names."""

    def under(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def inner(*args: Any, **kwargs: Any) -> Any:
            with record_function(_MARK + name):
                return call(*args, **kwargs)

        return inner

    def chosen(*args: Any) -> Callable[..., Any]:
        return under("attention", kernels.choose(*args))

    kinds = [type(create_reducer(name)) for name in list_methods()]
    overriding = {kind for kind in (Reducer, *kinds) if "reduce" in vars(kind)}
    with contextlib.ExitStack() as stack:
        for place, call in (
            ("zoo.adapters.attention.run_attention", under("attention", run_attention)),
            ("zoo.model.straight.choose", chosen),
            ("zoo.model.straight.fused", under("attention", kernels.fused)),
            ("zoo.model.straight.signals", under("attention", signals)),
        ):
            stack.enter_context(mock.patch(place, call))
        for kind in overriding:
            stack.enter_context(mock.patch.object(kind, "reduce", under("reducer", kind.reduce)))
        yield


def parts_of(step: Step) -> dict[str, float]:
    """Seconds of each part in one call."""
    with profile(activities=[ProfilerActivity.CPU]) as run:
        start = time.perf_counter()
        step()
        whole = time.perf_counter() - start
    found: dict[str, float] = defaultdict(float)
    for event in run.events():
        part, above = _NAMES.get(event.name), event
        while above is not None:
            if above.name.startswith(_MARK):
                part = above.name.removeprefix(_MARK)
                break
            if above.name == "aten::scaled_dot_product_attention":
                part = "attention"
            above = above.cpu_parent
        if not event.name.startswith(_MARK):
            found[part or "other"] += event.self_cpu_time_total / 1e6
    found[BETWEEN] = max(0.0, whole - sum(found.values()))
    return found


def parts_of_training(model: nn.Module, images: Tensor) -> Callable[[], dict[str, float]]:
    """What one training step is done with: seconds of each part of it."""
    model.train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    labels = torch.arange(images.shape[0])

    def step() -> dict[str, float]:
        marks = [time.perf_counter()]
        loss = F.cross_entropy(model(images), labels)
        marks.append(time.perf_counter())
        loss.backward()
        marks.append(time.perf_counter())
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        marks.append(time.perf_counter())
        return {p: b - a for p, a, b in zip(TRAINING, marks, marks[1:], strict=False)}

    return step


def measure(
    steps: Mapping[str, Callable[[], dict[str, float]]], rounds: int
) -> dict[str, dict[str, float]]:
    """Median seconds of each part of each candidate, which take turns."""
    for step in steps.values():
        step()
    seen: dict[str, list[dict[str, float]]] = {name: [] for name in steps}
    for round_ in range(rounds):
        for name in steps if round_ % 2 == 0 else reversed(steps):
            seen[name].append(steps[name]())
    parts = {part for runs in seen.values() for found in runs for part in found}
    return {
        name: {part: statistics.median(found.get(part, 0.0) for found in runs) for part in parts}
        for name, runs in seen.items()
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line."""
    usage = argparse.ArgumentParser(
        prog="python -m benchmarks.breakdown",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    usage.add_argument("--backbone", default="deit_small")
    usage.add_argument("--reducers", default="tome,topk,evit,pitome,diffrate,dpcknn,token_pooling")
    usage.add_argument("--batch", type=int, nargs="+", default=[16, 1])
    usage.add_argument("--mode", choices=("inference", "training"), default="inference")
    usage.add_argument("--threads", type=int, default=2)
    usage.add_argument("--rounds", type=int, default=9)
    options = usage.parse_args(arguments)
    torch.set_num_threads(options.threads)
    keep_pages()
    plain = plain_backbone(options.backbone)
    models = {DENSE: reduced(plain, None, own_kernels=True)}
    for name in options.reducers.split(","):
        models[name] = reduced(plain, name, schedule_of(name, backbone_name(options.backbone)))
    saved = {n: zoo.profile(models[DENSE]).gmacs / zoo.profile(m).gmacs for n, m in models.items()}
    for batch in options.batch:
        images = torch.randn(batch, 3, *plain.patch_embed.img_size)
        title = f"{options.backbone}, batch {batch}, {options.mode}"
        if options.mode == "training":
            # Weights are shared; what an update changes does not change the time.
            steps = {n: parts_of_training(m, images) for n, m in models.items()}
            print_table(measure(steps, options.rounds), saved, title, TRAINING)
            continue
        with marked():
            calls = {n: tasks.inference(m, images) for n, m in models.items()}
            found = measure({n: partial(parts_of, c) for n, c in calls.items()}, options.rounds)
        print_table(found, saved, title, PARTS)
    return 0


def print_table(
    found: dict[str, dict[str, float]], saved: dict[str, float], title: str, names: Sequence[str]
) -> None:
    """Print the named parts of each model as Markdown: milliseconds, and excess in percent."""
    dense = found[DENSE]
    whole = sum(dense.values())
    print(f"\n{title}: ms (excess)\n")
    print("| method | promised | " + " | ".join(names) + " | efficiency |")
    print("|---|---|" + "---|" * (len(names) + 1))
    for name, parts in found.items():
        cells = []
        for part in names:
            excess = 100 * (parts[part] * saved[name] - dense[part]) / whole
            more = "" if name == DENSE else f" ({excess:+.1f} %)"
            cells.append(f"{1e3 * parts[part]:.1f}{more}")
        efficiency = whole / sum(parts.values()) / saved[name]
        print(f"| {name} | {saved[name]:.2f}x | {' | '.join(cells)} | {efficiency:.3f} |")


if __name__ == "__main__":
    sys.exit(main())
