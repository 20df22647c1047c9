"""What it gains to run images of similar length together: `runtime.buckets`.

    python -m benchmarks.buckets --write

runs DeiT-S on batches in which pixels decide how many tokens an image keeps: as one padded batch,
in two groups and in four, in turns in one process, in float32 and with weights cast to bfloat16.
The images are noise that is flat from a row on, so that lengths are spread evenly, and drawings of
`data=openclipart` where they are installed. Every run is a row of `zoo.results.rows`.

    python -m benchmarks.buckets --rows results/speed/buckets.jsonl --write

makes the table again from rows that are there.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.bf16 import configured
from benchmarks.models import plain_backbone, reduced
from benchmarks.table import PAGE, inserted
from benchmarks.timing import keep_pages
from zoo.cost.sampling import patch_counts
from zoo.data import build_data
from zoo.errors import ZooError
from zoo.measure.describe import describe
from zoo.measure.machine import in_words, machine
from zoo.measure.throughput import take_turns
from zoo.model.reduced import ReducedViT
from zoo.results.rows import Row, append_row, new_row, read_rows

ROWS = Path(__file__).parents[1] / "results" / "speed" / "buckets.jsonl"
MARKS = ("<!-- buckets: python -m benchmarks.buckets -->", "<!-- end of buckets -->")
GROUPS = (1, 2, 4)
DTYPES = ("float32", "bfloat16")
CPU = torch.device("cpu")
#: Images and the method that looks at them.
CASES = (("spread", "pixelprune"), ("openclipart", "pixelprune"), ("openclipart", "apt"))


def spread(batch: int, size: int) -> Tensor:
    """Noise above and nothing below, from a third of the rows to all: `(B, 3, size, size)`."""
    x = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))
    for image, share in zip(x, torch.linspace(1 / 3, 1, batch).tolist(), strict=True):
        image[:, round(share * size / 16) * 16 :] = 0.0
    return x


def drawings(batch: int, model: ReducedViT) -> Tensor:
    """Every so many-th image of the test split, so that all categories have their turn.

    Raises:
        ZooError: If they are not installed.
    """
    data = build_data(configured(["data=openclipart", "data.num_workers=0"]))
    data.attach(model, check=False)
    data.setup("test")
    found: Any = data.test_dataloader().dataset
    step = len(found) // batch
    return torch.stack([found[i * step][0] for i in range(batch)])


def rows(backbone: str, batch: int, rounds: int) -> Iterator[Row]:
    """One row per kind of images, method, type and number of groups."""
    for kind, method in CASES:
        model = reduced(plain_backbone(backbone), method)
        try:
            size = model.tower.input_size(model.backbone)[1]
            x = spread(batch, size) if kind == "spread" else drawings(batch, model)
        except ZooError as error:
            print(f"left out: {method} on {kind}: {error}", file=sys.stderr)
            continue
        for dtype in DTYPES:
            model.to(getattr(torch, dtype))
            yield from _timed(model, x.to(getattr(torch, dtype)), kind, dtype, rounds)


@torch.inference_mode()
def _timed(model: ReducedViT, x: Tensor, kind: str, dtype: str, rounds: int) -> Iterator[Row]:
    def step(groups: int) -> Callable[[], Tensor]:
        def run() -> Tensor:
            logits: Tensor = model.set_runtime(buckets=groups)(x)
            return logits

        return run

    steps = [step(groups) for groups in GROUPS]
    answers = [run() for run in steps]
    _, info = model(x, return_info="trace")
    lengths = patch_counts(info)[:, 0] + model.prefix
    times = take_turns(steps, [1] * len(steps), rounds, CPU)
    for groups, logits, clocks in zip(GROUPS, answers, times, strict=True):
        model.set_runtime(buckets=groups)
        ms = 1e3 * statistics.median(wall for wall, _ in clocks)
        gains = {
            name: statistics.median(a[i] / b[i] for a, b in zip(times[0], clocks, strict=True))
            for i, name in enumerate(("speedup", "speedup_cpu"))
        }
        yield new_row(
            **describe(model),
            task=["throughput"],
            device="cpu",
            machine=machine(),
            threads=torch.get_num_threads(),
            dtype="float32",
            weights_dtype=None if dtype == "float32" else dtype,
            batch=len(x),
            seed=0,
            runtime={"buckets": groups},
            ms=ms,
            imgs_per_s=1e3 * len(x) / ms,
            bench={
                "images": kind,
                "rounds": rounds,
                "lengths": sorted(lengths.tolist()),
                "ms_cpu": 1e3 * statistics.median(cpu for _, cpu in clocks),
                **gains,
                "error": float((logits - answers[0]).abs().max()),
            },
        )


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: a line per kind of images, method and type."""
    lines = [
        "| images | method | type | tokens: least, mean, most | padding | one batch, ms "
        "| 2 groups | 4 groups | largest difference of logits |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in (r for r in found if r["runtime"]["buckets"] == 1):
        bench, dtype = row["bench"], row["weights_dtype"] or row["dtype"]
        same = {
            r["runtime"]["buckets"]: r["bench"]
            for r in found
            if (r["bench"]["images"], r["method"], r["weights_dtype"])
            == (bench["images"], row["method"], row["weights_dtype"])
        }
        lengths = bench["lengths"]
        mean = statistics.mean(lengths)
        cells = [
            bench["images"],
            row["method"],
            dtype,
            f"{lengths[0]}, {mean:.0f}, {lengths[-1]}",
            f"{100 * (1 - mean / lengths[-1]):.0f} %",
            f"{row['ms']:.0f}",
            *(f"{same[k]['speedup']:.2f}x" if k in same else "" for k in GROUPS[1:]),
            f"{max(b['error'] for b in same.values()):.1g}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line."""
    usage = argparse.ArgumentParser(prog="python -m benchmarks.buckets", description=__doc__)
    usage.add_argument("--rows", type=Path, help="the table of these rows; nothing is run")
    usage.add_argument("--results", type=Path, default=ROWS, help="where new rows go")
    usage.add_argument("--backbone", default="deit_small")
    usage.add_argument("--batch", type=int, default=16)
    usage.add_argument("--rounds", type=int, default=7)
    usage.add_argument("--threads", type=int, default=1)
    usage.add_argument("--write", action="store_true", help="change docs/performance.md")
    options = usage.parse_args(arguments)
    found: list[Row] = []
    if options.rows is not None:
        found = read_rows(options.rows)
    else:
        torch.set_num_threads(options.threads)
        keep_pages()
        print(in_words(machine()))
        for row in rows(options.backbone, options.batch, options.rounds):
            append_row(options.results, row)
            found.append(row)
            gain = row["bench"]["speedup_cpu"]
            name = f"{row['bench']['images']} {row['method']} {row['weights_dtype'] or 'float32'}"
            print(name, row["runtime"], f"{gain:.2f}x by CPU time", flush=True)
    print(table(found))
    if options.write:
        page = PAGE.read_text(encoding="utf-8")
        PAGE.write_text(inserted(page, table(found), *MARKS), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
