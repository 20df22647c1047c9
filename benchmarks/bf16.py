"""What half precision and aligned counts change: rows on digits, and the tables of docs/bf16.md.

    python -m benchmarks.bf16 --write

runs the shipped model on scikit-learn's digits, dense and with six reducers, in float32, under
autocast and with weights cast to bfloat16, and in float32 with counts aligned to 16 and 32. Every
run is a row of `zoo.results.rows`, whose `command` repeats its accuracy. What only two runs
together tell is under `bench`.

    python -m benchmarks.bf16 --rows results/precision/digits.jsonl --write

makes the tables again from rows that are there.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from torch import Tensor

from benchmarks.table import inserted
from zoo.data import build_data
from zoo.measure.device import like_weights
from zoo.model.reduced import ReducedViT
from zoo.published import config_folder
from zoo.results.rows import Row, append_row, read_rows
from zoo.run.build import build_model
from zoo.run.evaluate import evaluate
from zoo.version import hydra_base

ROOT = Path(__file__).parents[1]
PAGE, ROWS = ROOT / "docs" / "bf16.md", ROOT / "results" / "precision" / "digits.jsonl"
METHODS = ("none", "tome", "pitome", "topk", "evit", "token_pooling", "diffrate")
#: By name: overrides of `eval.py`, and whether autocast is on.
PRECISIONS = {
    "float32": [],
    "autocast": ["dtype=bfloat16"],
    "weights": ["weights_dtype=bfloat16"],
}
ALIGNS = (1, 16, 32)
SHARE = 0.6
FLOAT32 = "float32"


class Answers(NamedTuple):
    """Of a model for the images of a split.

    Attributes:
        logits: `(images, classes)` float32.
        sources: Token that holds each patch behind the first reduction, and in the end, `(images,
            patches)`; -1 where it was dropped. None where nothing is reduced.
    """

    logits: Tensor
    sources: tuple[Tensor, Tensor] | None


def overrides(method: str, align: int) -> list[str]:
    """Words for `eval.py` that choose a model."""
    words = ["weights=vit_digits", "device=cpu", "deterministic=true", "task=[accuracy,flops]"]
    if method == "none":
        return [*words, "reducer=none"]
    words += [f"reducer={method}", "schedule=target_gmacs", f"schedule.fraction={SHARE}"]
    # Few tokens cannot be halved to a multiple of 32: then as near as it gets.
    return words if align == 1 else [*words, f"schedule.align={align}", "schedule.nearest=true"]


def configured(words: Sequence[str]) -> Any:
    """configs/eval.yaml with these overrides."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_folder()), **hydra_base()):
        return compose("eval", list(words))


@torch.inference_mode()
def answers(cfg: Any, autocast: bool, limit: int | None = None) -> Answers:
    """Run the model of a configuration on the tested split."""
    model = build_model(cfg).eval()
    data = build_data(cfg)
    data.attach(model)
    data.setup("test")
    logits, first, last, seen = [], [], [], 0
    for images, _ in data.test_dataloader():
        images = like_weights(images[: None if limit is None else limit - seen], model, CPU)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out, info = model(images, return_info="trace")
        logits.append(out.float())
        if (block := _reducing(model)) is not None:
            first.append(info.trace[block].source)
            last.append(info.source)
        seen += len(images)
        if seen == limit:
            break
    sources = (torch.cat(first), torch.cat(last)) if first else None
    return Answers(torch.cat(logits), sources)


CPU = torch.device("cpu")


def _reducing(model: ReducedViT) -> int | None:
    """The first block behind which there are fewer tokens."""
    found = [i for i, (before, after) in enumerate(model.token_counts()) if after < before]
    return found[0] if found else None


def compare(own: Answers, exact: Answers) -> dict[str, float | None]:
    """What became of the answers of float32.

    Returns:
        `logit_error`, length of the difference over the length of the logits; `agreement`, percent
        of images with the same first class; `pairs_first` and `pairs`, percent of the pairs of
        patches that share a token in float32 and share one here too, behind the first reduction
        and in the end; `kept_first` and `kept`, the same of the patches that some token holds.
    """
    error = (own.logits - exact.logits).norm() / exact.logits.norm()
    same = (own.logits.argmax(1) == exact.logits.argmax(1)).float().mean()
    found: dict[str, float | None] = {"logit_error": float(error), "agreement": 100 * float(same)}
    for place, name in enumerate(("_first", "")):
        pairs = kept = None
        if own.sources is not None and exact.sources is not None:
            ours, theirs = own.sources[place], exact.sources[place]
            pairs = _share(_together(ours), _together(theirs))
            kept = _share(ours >= 0, theirs >= 0)
        found |= {f"pairs{name}": pairs, f"kept{name}": kept}
    return found


def _together(source: Tensor) -> Tensor:
    """Which pairs of patches one token holds, `(B, N, N)`."""
    same = (source.unsqueeze(2) == source.unsqueeze(1)) & (source >= 0).unsqueeze(2)
    return same.triu(1)


def _share(ours: Tensor, theirs: Tensor) -> float | None:
    total = int(theirs.sum())
    return 100 * int((ours & theirs).sum()) / total if total else None


def rows(methods: Sequence[str] = METHODS, limit: int | None = None) -> Iterator[Row]:
    """One row per method, precision and alignment."""
    few = [] if limit is None else [f"limit={limit}"]
    for method in methods:
        exact = None
        for align in ALIGNS if method != "none" else (1,):
            for name, more in PRECISIONS.items() if align == 1 else [(FLOAT32, [])]:
                words = [*overrides(method, align), *more, *few]
                found = answers(configured(words), name == "autocast", limit)
                exact = exact or found
                row = evaluate(configured(words))
                bench = {"precision": name, "align": align, **compare(found, exact)}
                yield row | {
                    "command": shlex.join(["python", "eval.py", *words]),
                    "bench": bench,
                }


# -- tables ----------------------------------------------------------------------------------------


def precision_table(found: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: accuracy and logits of every method in each precision."""
    head = ["method", "float32", "autocast", "weights_dtype", "logit error", "same answer"]
    lines = _head([*head, "pairs, first reduction", "pairs, in the end", "patches kept"])
    for method, mine in _by_method(found).items():
        runs = {name: mine[name, 1] for name in PRECISIONS if (name, 1) in mine}
        cells = [f"{row['top1']:.2f}" for row in runs.values()]
        half = [row["bench"] for name, row in runs.items() if name != FLOAT32]
        for key, form in (("logit_error", ".4f"), ("agreement", ".1f")):
            cells.append(", ".join(f"{bench[key]:{form}}" for bench in half))
        for key in ("pairs_first", "pairs", "kept"):
            cells.append(", ".join("" if b[key] is None else f"{b[key]:.1f}" for b in half))
        lines.append(_line([method, *(c.strip(", ") for c in cells)]))
    return "\n".join(lines)


def alignment_table(found: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: counts, cost and accuracy of every method for each alignment."""
    lines = _head(["method", "align", "tokens behind the blocks", "GMACs", "accuracy", "95 %"])
    for method, mine in _by_method(found).items():
        for align in ALIGNS:
            row = mine.get((FLOAT32, align))
            if row is None or method == "none":
                continue
            counts = " ".join(str(after) for _, after in row["tokens"])
            low, high = row["ci95"]
            cost = f"{row['gmacs']['total']:.4f}"
            span = f"{low:.1f} to {high:.1f}"
            lines.append(_line([method, str(align), counts, cost, f"{row['top1']:.2f}", span]))
    return "\n".join(lines)


def _by_method(
    found: Sequence[Mapping[str, Any]],
) -> dict[str, dict[tuple[str, int], Mapping[str, Any]]]:
    out: dict[str, dict[tuple[str, int], Mapping[str, Any]]] = {}
    for row in found:
        key = row["bench"]["precision"], row["bench"]["align"]
        out.setdefault(row["method"], {})[key] = row
    return out


def _head(names: Sequence[str]) -> list[str]:
    return [_line(names), "|" + "---|" * len(names)]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


TABLES = {"precision": precision_table, "alignment": alignment_table}


def write_tables(page: str, found: Sequence[Mapping[str, Any]]) -> str:
    """The page with its tables from these rows."""
    for name, table in TABLES.items():
        marks = (f"<!-- {name}: python -m benchmarks.bf16 -->", f"<!-- end of {name} -->")
        page = inserted(page, table(found), *marks)
    return page


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line."""
    usage = argparse.ArgumentParser(prog="python -m benchmarks.bf16", description=__doc__)
    usage.add_argument("--rows", type=Path, help="tables of these rows; nothing is run")
    usage.add_argument("--results", type=Path, default=ROWS, help="where new rows go")
    usage.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    usage.add_argument("--limit", type=int, help="the first N images only")
    usage.add_argument("--write", action="store_true", help="change docs/bf16.md")
    options = usage.parse_args(arguments)
    found: list[Row] = []
    if options.rows is not None:
        found = read_rows(options.rows)
    else:
        for row in rows(options.methods, options.limit):
            append_row(options.results, row)
            found.append(row)
            print(row["command"], f"{row['top1']:.2f} %", flush=True)
    for table in TABLES.values():
        print(f"\n{table(found)}")
    if options.write:
        PAGE.write_text(write_tables(PAGE.read_text(encoding="utf-8"), found), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
