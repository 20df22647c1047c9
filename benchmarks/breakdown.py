"""Where the time of a forward pass goes, and which part keeps a method from its promise.

    python -m benchmarks.breakdown [--batch 16 1] [--reducers tome,topk] [--backbone deit_small]

Every operation belongs to one part. `excess` is what a part takes beyond (dense time of the part)
/ (dense GMACs / reduced GMACs), in percent of the dense model's whole time over that ratio: the sum
over the parts is what separates the efficiency from 1. Recording costs time too, most where
operations are small, so the efficiency here is lower than that of `benchmarks.speed`; what matters
is the shares. Dense has the kernels of the reduced models.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
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

PARTS = ("linear layers", "attention", "reducer", "norm, activation", "embedding", "other")
BETWEEN = "between operations"
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
            ("zoo.adapters.straight.choose", chosen),
            ("zoo.adapters.straight.fused", under("attention", kernels.fused)),
            ("zoo.adapters.straight.signals", under("attention", signals)),
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


def measure(steps: dict[str, Step], rounds: int) -> dict[str, dict[str, float]]:
    """Median seconds of each part of each candidate, which take turns."""
    with marked():
        for step in steps.values():
            step()
        seen: dict[str, list[dict[str, float]]] = {name: [] for name in steps}
        for round_ in range(rounds):
            for name in steps if round_ % 2 == 0 else reversed(steps):
                seen[name].append(parts_of(steps[name]))
    return {
        name: {
            part: statistics.median(r.get(part, 0.0) for r in runs) for part in (*PARTS, BETWEEN)
        }
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
        steps = {n: tasks.inference(m, images) for n, m in models.items()}
        print_table(measure(steps, options.rounds), saved, f"{options.backbone}, batch {batch}")
    return 0


def print_table(found: dict[str, dict[str, float]], saved: dict[str, float], title: str) -> None:
    """Print the parts of each model as Markdown: milliseconds, and excess in percent."""
    dense = found[DENSE]
    whole = sum(dense.values())
    print(f"\n{title}: ms (excess)\n")
    print("| method | promised | " + " | ".join((*PARTS, BETWEEN)) + " | efficiency |")
    print("|---|---|" + "---|" * (len(PARTS) + 2))
    for name, parts in found.items():
        cells = []
        for part in (*PARTS, BETWEEN):
            excess = 100 * (parts[part] * saved[name] - dense[part]) / whole
            more = "" if name == DENSE else f" ({excess:+.1f} %)"
            cells.append(f"{1e3 * parts[part]:.1f}{more}")
        efficiency = whole / sum(parts.values()) / saved[name]
        print(f"| {name} | {saved[name]:.2f}x | {' | '.join(cells)} | {efficiency:.3f} |")


if __name__ == "__main__":
    sys.exit(main())
