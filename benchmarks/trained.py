"""What training buys: vit_fashion fine-tuned with each method, most for 400 steps, and controls.

    python -m benchmarks.trained            # trains what has no row yet
    python -m benchmarks.trained --list     # the commands

Each recipe is one `python train.py` whose row goes to results/leaderboard/fashion_trained.jsonl; a
recipe that has a row there is left out, so an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zoo.results.rows import read_rows

ROOT = Path(__file__).parents[1]
ROWS = ROOT / "results" / "leaderboard" / "fashion_trained.jsonl"
# Words that change where a run writes or how it tells, not what it measures.
_ASIDE = ("results=", "progress=", "threads=", "output_dir=")
TUNED = "experiment=leaderboard/trained"
SCRATCH = "experiment=vit_fashion_coarse weights_dtype=bfloat16 trainer.precision=bf16-mixed"
LOOKUP = (
    f"{TUNED} backbone=lookupvit_digits +backbone.args.img_size=28 +backbone.args.depth=12 "
    "+backbone.args.num_heads=3 +backbone.args.mlp_ratio=4"
)
JUMBO = (
    f"{SCRATCH} trainer.max_epochs=3 backbone=jumbo_digits +backbone.args.img_size=28 "
    "+backbone.args.depth=12 +backbone.args.num_heads=3"
)
#: 400 steps, in two seeds: whether another order of the images tells another story.
TWICE = (
    f"{TUNED} reducer=none",
    f"{TUNED} reducer=topk",
    f"{TUNED} reducer=topk plugin=clca",
    f"{TUNED} reducer=evit",
    f"{TUNED} reducer=evit plugin=clca",
    f"{TUNED} reducer=tome",
    f"{TUNED} reducer=tome plugin=clca",
    f"{TUNED} reducer=token_pooling",
    f"{TUNED} reducer=dynamicvit",
    f"{TUNED} reducer=dtem module=reducer_only",
    f"{TUNED} reducer=ltmp module=reducer_only optim=thresholds optim.lr=0.01 "
    "reducer.limit=false augment=none",
)
RECIPES = (
    *TWICE,
    f"{TUNED} reducer=diffrate module=diffrate_search optim=rates lr_schedule=rates "
    "optim.lr=0.01 callbacks=search trainer.gradient_clip_val=null",
    # The same search over as many epochs as the paper's, and with the step of the official code.
    f"{TUNED} reducer=diffrate module=diffrate_search module.granularity=4 optim=rates "
    "lr_schedule=rates optim.lr=0.01 callbacks=search trainer.gradient_clip_val=null "
    "trainer.max_epochs=3 trainer.limit_train_batches=1.0",
    f"{LOOKUP} backbone.args.compressed_grid=5",
    f"{LOOKUP} backbone.args.compressed_grid=6",  # half of the dense model's cost, as the others
    # Jumbo is another architecture: from scratch, beside a plain ViT of as many steps.
    f"{SCRATCH} trainer.max_epochs=3",
    f"{JUMBO} +backbone.args.embed_dim=96",
    f"{JUMBO} +backbone.args.embed_dim=87",  # as narrow as costs no more than the plain ViT
    *(f"{recipe} seed=1" for recipe in TWICE),
)


def words(command: str) -> frozenset[str]:
    """What a command asks for: its options but those of `_ASIDE`, upper and lower case alike."""
    found = shlex.split(command)
    return frozenset(w.lower() for w in found if "=" in w and not w.startswith(_ASIDE))


def missing(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Recipes that no good row has been made by."""
    done = {words(row["command"]) for row in rows if row["status"] == "ok"}
    return [recipe for recipe in RECIPES if words(recipe) not in done]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line."""
    usage = argparse.ArgumentParser(prog="python -m benchmarks.trained")
    usage.add_argument("--list", action="store_true", help="print the commands, run none")
    given = usage.parse_args(arguments)
    todo = missing(read_rows(ROWS)) if ROWS.is_file() and not given.list else list(RECIPES)
    failed = 0
    for recipe in todo:
        typed = [
            "train.py",
            *shlex.split(recipe),
            f"results={ROWS.relative_to(ROOT)}",
            "progress=false",
        ]
        print("python", shlex.join(typed), flush=True)
        if not given.list:
            done = subprocess.run([sys.executable, *typed], cwd=ROOT, check=False)
            failed += done.returncode != 0
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
