"""Rows that a sweep adds by itself, so that its methods are compared with what they must beat.

`dense` is the model with nothing reduced; `resolution` is the same model fed smaller images, which
saves as much as a reducer does and costs no code. Both need no training; the other two controls, a
smaller model and a dense model that was fine-tuned as long, are trained once (see
``experiment=vit_digits_small`` and ``experiment=dense_digits``) and shown beside the sweep.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.errors import ZooError
from zoo.run.done import digest, done_before
from zoo.run.remarks import add_note, noted
from zoo.run.variants import NOTHING, at_size, nothing_reduced

if TYPE_CHECKING:
    from omegaconf import DictConfig

KINDS = ("dense", "resolution")

# What does not tell one model and its data from another, or only its budget.
_FREE = ("reducer", "schedule", "plugin", "seed", "results", "paths", "control", "resolutions")


@dataclass(frozen=True)
class Job:
    """One job of a sweep, as it was saved: its configuration and what was typed for it."""

    cfg: DictConfig
    overrides: tuple[str, ...]

    @property
    def identity(self) -> str:
        """Model and data, whatever reduces the tokens."""
        from omegaconf import OmegaConf

        found: Any = OmegaConf.to_container(self.cfg, resolve=False)
        return json.dumps({k: v for k, v in found.items() if k not in _FREE}, sort_keys=True)

    @property
    def dense(self) -> bool:
        """Whether it runs the dense model: nothing reduces, and the weights bring nothing along."""
        reducer, plugin = self.cfg.get("reducer"), self.cfg.get("plugin")
        nothing: Any = NOTHING["reducer"]
        chosen = reducer is not None and reducer.get("_target_") == nothing["_target_"]
        return chosen and (plugin is None or plugin == NOTHING["plugin"])


def saved_jobs(folder: Path) -> list[Job]:
    """Returns the jobs of a sweep from the configurations that Hydra saved in its folder."""
    from omegaconf import OmegaConf

    found = []
    for path in folder.glob("*/.hydra/config.yaml"):
        typed = path.with_name("overrides.yaml")
        overrides = tuple(OmegaConf.load(typed)) if typed.is_file() else ()
        number = int(path.parts[-3]) if path.parts[-3].isdigit() else 0
        found.append((number, Job(OmegaConf.load(path), overrides)))  # type: ignore[arg-type]
    return [job for _, job in sorted(found, key=lambda pair: pair[0])]


def add_controls(config: DictConfig, rows: Path) -> None:
    """Measures the controls that a sweep lacks and appends their rows; prints a line for each.

    A control that fails leaves a row with its error, like any job.

    Args:
        config: The sweep's configuration, its part `hydra` included.
        rows: The sweep's file of rows.
    """
    from zoo.report.words import summary_line
    from zoo.results.rows import append_row, new_row
    from zoo.run.messages import explain

    saved = saved_jobs(Path(str(config.hydra.sweep.dir)))
    jobs = [_alone(job) for job in saved if "control" in job.cfg]
    program = _program(rows)
    for job, error in missing_controls(jobs):
        what = digest(job.cfg)
        if error is None and (earlier := done_before(job.cfg, what)):
            for row in earlier:
                print(f"{summary_line(row)} | done before", flush=True)
                append_row(rows, row)
            continue
        try:
            if error is not None:
                raise error
            from zoo.run.evaluate import evaluate_each

            with noted(quiet=True) as notes:
                found = evaluate_each(job.cfg)
            for row in found:
                for note in notes:
                    add_note(row, note)
        except Exception as problem:
            message = explain(problem) or f"{type(problem).__name__}: {problem}"
            print(f"error: {message} [{' '.join(job.overrides)}]", file=sys.stderr)
            failed = new_row(
                status="failed",
                error=message,
                task=list(job.cfg.task) if not isinstance(job.cfg.task, str) else [job.cfg.task],
                method="none",
                backbone=_name(job.cfg),
                dataset=job.cfg.data.name,
                weights=None if job.cfg.weights is None else str(job.cfg.weights),
            )
            found = [failed]
        else:
            for row in found:
                print(summary_line(row), flush=True)
        for row in found:
            row.update(job=what, command=shlex.join([*program, *job.overrides]))
            for path in (str(job.cfg.results), rows):
                append_row(path, row)


def _alone(job: Job) -> Job:
    """The job by one process: the sweep cannot start others by repeating its command."""
    from omegaconf import OmegaConf

    trainer = job.cfg.get("trainer")
    if trainer is None or str(trainer.strategy).endswith(("_spawn", "_fork")):
        return job
    cfg = job.cfg.copy()
    OmegaConf.set_struct(cfg, False)
    cfg.trainer, cfg.device = None, "cpu" if trainer.accelerator == "cpu" else "auto"
    kept = [text for text in job.overrides if not re.match(r"[+~]*(trainer[.=]|device=)", text)]
    return Job(cfg, (*kept, f"device={cfg.device}"))


def missing_controls(jobs: Sequence[Job]) -> Iterator[tuple[Job, Exception | None]]:
    """Yields the controls that no job of the sweep is, each once, or why there can be none.

    Raises:
        ZooError: `control` names what there is not.
    """
    done = {job.identity for job in jobs if job.dense}
    for first in {job.identity: job for job in reversed(jobs)}.values():
        kinds = first.cfg.control
        kinds = [kinds] if isinstance(kinds, str) else list(kinds or ())
        dense = _without_reduction(first)
        try:
            if unknown := [kind for kind in kinds if kind not in KINDS]:
                choices = ", ".join(KINDS)
                raise ZooError(f"control={unknown[0]}: no such control; choose from {choices}")
            found = list(_controls(dense, kinds)) if kinds else []
        except Exception as error:
            yield dense, error
            continue
        for control in found:
            if control.identity not in done:
                done.add(control.identity)
                yield control, None


def _controls(dense: Job, kinds: Sequence[str]) -> Iterator[Job]:
    from zoo.adapters.standalone import as_standalone
    from zoo.run.build import build_model

    model = build_model(dense.cfg)
    if as_standalone(model.backbone) is not None:
        return  # there is nothing dense about it
    if "dense" in kinds:
        yield dense
    if "resolution" in kinds:
        sides = model.tower.input_size(model.backbone)[1:]
        patch = model.tower.patch_size(model.backbone)
        if sides[0] == sides[1] and patch[0] == patch[1]:
            for pixels in lower_sizes(sides[0], patch[0], list(dense.cfg.resolutions)):
                yield _at_size(dense, pixels)


def lower_sizes(side: int, patch: int, wanted: Sequence[float]) -> list[int]:
    """Input sizes below a model's own.

    Args:
        side: The model's own, in pixels.
        patch: Side of a patch.
        wanted: Shares of the patches that shall remain (below 1), or pixels.

    Returns:
        Multiples of the patch size, the largest first, without the model's own size.

    Raises:
        ZooError: A number is not above 0.

    >>> lower_sizes(224, 16, [0.75, 0.5, 0.35])
    [192, 160, 128]
    """
    if bad := [share for share in wanted if not share > 0]:
        raise ZooError(f"resolutions must be shares of the patches or pixels, got {bad[0]}")
    pixels = [share if share >= 1 else side * share**0.5 for share in wanted]
    found = {max(1, round(value / patch)) * patch for value in pixels}
    return sorted((size for size in found if size < side), reverse=True)


def _without_reduction(job: Job) -> Job:
    cfg = nothing_reduced(job.cfg)
    parts = re.compile(r"[+~]*(reducer|schedule|plugin)[.=]")
    kept = [text for text in job.overrides if not parts.match(text)]
    return Job(cfg, (*kept, "reducer=none"))


def _at_size(job: Job, pixels: int) -> Job:
    from omegaconf import OmegaConf

    overrides = [text for text in job.overrides if "backbone.args.img_size=" not in text]
    overrides.append(f"++backbone.args.img_size={pixels}")
    if OmegaConf.select(job.cfg, "data.img_size") is not None:
        overrides.append("data.img_size=null")
    return Job(at_size(job.cfg, pixels), tuple(overrides))


def _name(cfg: DictConfig) -> str | None:
    backbone = cfg.get("backbone")
    name = backbone.get("name") if backbone else None
    return str(name or cfg.weights or "").partition(".")[0] or None


def _program(rows: Path) -> list[str]:
    """How this sweep's program was called: the start of its rows' commands."""
    from zoo.results.rows import read_rows

    for row in read_rows(rows, broken=[]):
        words = shlex.split(str(row.get("command") or ""))
        start = next((i for i, word in enumerate(words) if "=" in word), len(words))
        if words[:start]:
            return words[:start]
    return ["python", "eval.py"]
