"""Two checkouts side by side: is the code after a change as fast as before?

    git worktree add ../before COMMIT
    python -m benchmarks.compare ../before --batch 1 16 --out results/speed/compare.jsonl

Each checkout runs in a process of its own and builds the same models with the same random weights.
The two take turns, call by call, so that a slow minute of the machine slows both; the median of the
ratios of the rounds counts. Logits are compared, too. Rows go to a `.jsonl` file in the schema of
`zoo.results.rows`, with both times and the ratio under `bench`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.models import plain_backbone, reduced, schedule_of
from zoo.measure.costs import count_costs
from zoo.measure.describe import describe
from zoo.results.rows import append_row, new_row

METHODS = ("topk", "tome", "evit", "diffrate", "pitome", "token_pooling", "dpcknn", "patchmerger")
#: Runs in either checkout, so it may use only what both have. A line of JSON in, a line out.
WORKER = """
import json, sys, time
import torch
from benchmarks.models import plain_backbone, reduced, schedule_of
threads, backbone = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(threads)
plain = plain_backbone(backbone)
models = {}
for line in sys.stdin:
    ask = json.loads(line)
    name, batch = ask["method"], ask["batch"]
    size = plain.patch_embed.img_size
    images = torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1))
    if name not in models:
        schedule = schedule_of(name, backbone)
        models[name] = reduced(plain, None if name == "none" else name, schedule).eval()
    with torch.inference_mode():
        logits = models[name](images)
        models[name](images)
        start = time.perf_counter()
        for _ in range(ask["calls"]):
            models[name](images)
        spent = (time.perf_counter() - start) / ask["calls"]
    print(json.dumps({"seconds": spent, "logits": logits[:1].tolist()}), flush=True)
"""


class Checkout:
    """A process that runs the code of one folder."""

    def __init__(self, folder: Path, threads: int, backbone: str) -> None:
        self.folder = folder
        environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": str(threads)}
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER, str(threads), backbone],
            cwd=folder,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, method: str, batch: int, calls: int) -> dict[str, Any]:
        """Seconds per call and logits.

        Raises:
            RuntimeError: If the process has ended.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        print(
            json.dumps({"method": method, "batch": batch, "calls": calls}),
            file=self.process.stdin,
            flush=True,
        )
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{self.folder}: the process ended at {method}, batch {batch}")
        found: dict[str, Any] = json.loads(answer)
        return found

    def commit(self) -> str:
        """The commit that is checked out."""
        command = ["git", "-C", str(self.folder), "rev-parse", "HEAD"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def main(arguments: Sequence[str] | None = None) -> int:
    """Compares and prints a table; returns the exit code."""
    options = parser().parse_args(arguments)
    here = Path(__file__).resolve().parents[1]
    pair = [
        Checkout(Path(folder).resolve(), options.threads, options.backbone)
        for folder in (options.before, here)
    ]
    print(
        f"{'method':<16} {'batch':>5} {'before ms':>10} {'after ms':>10} {'after/before':>13} gap"
    )
    for batch in options.batch:
        for method in options.reducers.split(","):
            row = compare(pair, method, batch, options)
            append_row(options.out, row)
            bench = row["bench"]
            print(
                f"{method:<16} {batch:>5} {bench['ms_before']:>10.2f} {row['ms']:>10.2f} "
                f"{bench['ratio']:>13.3f} {bench['logits_gap']:.1e}",
                flush=True,
            )
    return 0


def compare(
    pair: Sequence[Checkout], method: str, batch: int, options: argparse.Namespace
) -> dict[str, Any]:
    """The row of one method at one batch size."""
    first = [one.ask(method, batch, 1) for one in pair]
    calls = max(1, round(options.min_time / first[0]["seconds"]))
    gap = max(abs(a - b) for a, b in zip(*(one["logits"][0] for one in first), strict=True))
    times: list[list[float]] = [[], []]
    for i in range(options.rounds):
        for k in (0, 1) if i % 2 == 0 else (1, 0):
            times[k].append(pair[k].ask(method, batch, calls)["seconds"])
    ratios = [after / before for before, after in zip(*times, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    before, after = (statistics.median(t) for t in times)
    model = reduced(
        plain_backbone(options.backbone),
        None if method == "none" else method,
        schedule_of(method, options.backbone),
    )
    return new_row(
        **describe(model),
        **count_costs(model, trace=False),
        task=["throughput"],
        batch=batch,
        threads=options.threads,
        device="cpu",
        dtype="float32",
        compile=False,
        seed=0,
        ms=1e3 * after,
        imgs_per_s=batch / after,
        bench={
            "mode": "compare",
            "rounds": options.rounds,
            "ms_before": 1e3 * before,
            "ratio": statistics.median(ratios),
            "ratio_quartiles": [low, high],
            "logits_gap": gap,
            "commit_before": pair[0].commit(),
        },
    )


def parser() -> argparse.ArgumentParser:
    """The command line."""
    out = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__)
    out.add_argument("before", help="folder of the other checkout")
    out.add_argument("--backbone", default="deit_small_patch16_224")
    out.add_argument("--reducers", default=",".join(METHODS), help="names, separated by commas")
    out.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    out.add_argument("--rounds", type=int, default=11)
    out.add_argument("--min-time", type=float, default=0.3, help="seconds per turn")
    out.add_argument("--threads", type=int, default=2)
    out.add_argument("--out", default="results/local/compare.jsonl")
    return out


if __name__ == "__main__":
    sys.exit(main())
