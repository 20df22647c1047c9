"""What train.py, eval.py and the console command share around `@hydra.main`.

`guarded(main)` turns every mistake of the person at the keyboard into one line and an exit code;
`job(kind, cfg)` does the work of one run, appends its row and prints its summary line.
Nothing here may import torch, timm or Lightning at module level: --help, --cfg, a typo and tab
completion have to answer at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from zoo.measure.progress import say, show, wanted
from zoo.run import help
from zoo.run.console import written_out
from zoo.run.done import digest, done_before
from zoo.run.messages import explain, is_lost, unknown_flag
from zoo.run.outcome import FAILED, INTERRUPTED, USAGE, State, complain, is_first_process
from zoo.run.overrides import for_hydra, prepare
from zoo.run.record import (
    check_folder,
    check_writable,
    command_line,
    failed_row,
    record,
    results_file,
)
from zoo.run.remarks import (
    Skipped,
    add_note,
    check_trained,
    noted,
    sweeps_reducers,
    without_class_token,
)

if TYPE_CHECKING:
    from omegaconf import DictConfig

Row = dict[str, Any]


_FULL_ERROR = "HYDRA_FULL_ERROR"


def guarded(
    main: Callable[[], Any],
    kind: str,
    argv: list[str] | None = None,
    shown: list[str] | None = None,
) -> int:
    """Runs a `@hydra.main` function and returns the exit code of the command.

    Args:
        main: The decorated function; it reads `sys.argv` by itself.
        kind: "train" or "eval".
        argv: The arguments that Hydra shall see (program name first); default `sys.argv`.
        shown: The arguments as they were typed, where Hydra shall not see all of them.
    """
    return written_out(lambda: _guarded(main, kind, argv, shown))


def _guarded(
    main: Callable[[], Any], kind: str, argv: list[str] | None, shown: list[str] | None
) -> int:
    from zoo.run.launchers import refuse
    from zoo.run.typed import typed
    from zoo.version import hush

    original, before = list(sys.argv), os.environ.get(_FULL_ERROR)
    typed().argv, typed().full_error = shown or argv or original, before == "1"
    State.failed_jobs, State.report_failed, State.rows_path = 0, False, None
    sys.argv = list(argv or original)
    given = sys.argv[1:]
    if message := unknown_flag(given) or refuse(given) or prepare(given):
        sys.argv = original
        # Of several processes one says it.
        return complain(message) if is_first_process() else USAGE
    sys.argv[1:] = for_hydra(given)
    # With this set Hydra raises its errors instead of printing them with a trace and a hint.
    os.environ[_FULL_ERROR] = "1"
    try:
        if help.asked(sys.argv[1:]):
            print(help.page(kind, sys.argv[1:]))
        else:
            hush()
            main()
    except KeyboardInterrupt:
        kept = f"; the rows so far are in {State.rows_path}" if State.rows_path else ""
        print(f"interrupted{kept}", file=sys.stderr)
        return INTERRUPTED
    except SystemExit as end:
        if isinstance(end.code, str):
            return complain(end.code)
        return int(end.code or 0)
    except Exception as error:
        message = explain(error)
        if message is None or typed().full_error:
            raise
        return complain(message)
    finally:
        sys.argv = original
        _restore_full_error(before)
    if State.failed_jobs:
        jobs = "job" if State.failed_jobs == 1 else "jobs"
        print(f"error: {State.failed_jobs} {jobs} of the sweep failed", file=sys.stderr)
        return FAILED
    return FAILED if State.report_failed else 0


def job(kind: str, cfg: DictConfig) -> Row:
    """Does one run: trains or evaluates, appends the row, prints the summary line.

    In a sweep a failing job leaves a row with status "failed" and the next job starts; a single
    run ends with the error.

    Args:
        kind: "train" or "eval".
        cfg: The composed configuration.

    Raises:
        SystemExit: The run failed; the message has been printed.
    """
    run = _read(kind, cfg)
    try:
        found = _run(run)
        if found.earlier:
            return _taken_over(run, found.rows)
    except Exception as error:
        return _failed(run, error)
    finally:
        os.environ[_FULL_ERROR] = "1"
    return _told(run, found)


class _Run(NamedTuple):
    """One run as it was asked for.

    Attributes:
        kind: "train" or "eval".
        cfg: The composed configuration.
        overrides: What was typed; of the whole sweep where this is a job of one.
        sweep: Whether it is.
        aloud: Whether it prints its own line.
        full_error: Whether errors are wanted as they are.
    """

    kind: str
    cfg: DictConfig
    overrides: list[str]
    sweep: bool
    aloud: bool
    full_error: bool

    def first(self) -> bool:
        """Whether this process speaks for all of the run; who is first may turn out on the way."""
        return is_first_process(self.kind == "train" or self.cfg.get("trainer") is not None)


class _Found(NamedTuple):
    """What a run has found.

    Attributes:
        rows: Of which the first stands for it.
        job: Digest that tells it from other jobs.
        more: What has to be typed beside the overrides to get it.
        notes: What loading weights had to say.
        earlier: Whether an earlier run of the job has found it.
    """

    rows: list[Row]
    job: str | None
    more: Sequence[str] = ()
    notes: Sequence[str] = ()
    earlier: bool = False


def _read(kind: str, cfg: DictConfig) -> _Run:
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from zoo.run.launchers import speaks
    from zoo.run.typed import command_words, typed

    # Lightning starts the other processes of a DDP run from sys.argv, and those need the
    # environment as the user left it.
    sys.argv, full_error = command_words(), typed().full_error
    _restore_full_error("1" if full_error else None)
    # Said by libraries to their own authors, on every run.
    warnings.filterwarnings("ignore", message=".*torch.jit.script", category=FutureWarning)
    hydra = HydraConfig.get()
    sweep = hydra.mode == RunMode.MULTIRUN
    return _Run(kind, cfg, _overrides(sweep), sweep, speaks(hydra), full_error)


def _run(run: _Run) -> _Found:
    """Does the work, unless that was done before."""
    cfg, job = run.cfg, None
    more, notes = list[str](), list[str]()
    try:
        _begin(run)
        if run.kind == "eval":
            job = digest(cfg)
            if earlier := done_before(cfg, job):
                return _Found(earlier, job, earlier=True)
            if run.sweep:
                check_trained(cfg)
        work = _work(run.kind)
        with noted(quiet=run.sweep) as notes:
            if run.sweep and sweeps_reducers(run.overrides):
                rows, more = without_class_token(work, cfg, run.overrides)
            else:
                rows = work(cfg)
    except Skipped as reason:
        rows = [failed_row(cfg, str(reason), status="skipped")]
    return _Found(rows, job, more, notes)


def _begin(run: _Run) -> None:
    """All that can be refused before it costs anything."""
    from zoo.run.launchers import join_tasks
    from zoo.run.schema import check_config
    from zoo.run.sweep import refuse_subprocess_ddp

    cfg = run.cfg
    join_tasks()
    if run.sweep:
        refuse_subprocess_ddp(cfg, run.kind)
    check_config(cfg, run.kind, run.overrides)
    show(wanted(cfg) if run.aloud else False)
    check_writable(results_file(cfg))
    if cfg.get("trainer") is not None and not run.sweep:
        from zoo.run.deaths import announce

        announce(partial(_died, cfg))
    if run.kind == "train":
        check_folder(str(cfg.output_dir))


def _failed(run: _Run, error: Exception) -> Row:
    """Says and writes down that a run has failed; only a job of a sweep returns.

    Raises:
        SystemExit: It was a single run.
    """
    from hydra.core.hydra_config import HydraConfig

    message = explain(error)
    if is_lost(error):
        from zoo.run.deaths import hear

        hear()
    if run.first():
        with contextlib.suppress(Exception):  # the error itself is what has to be seen
            record(failed_row(run.cfg, message or f"{type(error).__name__}: {error}"), run.cfg)
    if run.full_error and not run.sweep:
        raise error
    if message is None:
        traceback.print_exception(error)
    elif run.sweep and run.aloud:
        say(f"error: {message} [{' '.join(HydraConfig.get().overrides.task)}]", sys.stderr)
    if not run.sweep:
        raise SystemExit(FAILED if message is None else complain(message)) from error
    State.failed_jobs += 1
    return {"status": "failed"}


def _told(run: _Run, found: _Found) -> Row:
    """Writes rows down and says what is in them.

    Raises:
        SystemExit: They cannot be written, or a single run measured what is no number.
    """
    from zoo.report.words import summary_line

    rows, sweep = found.rows, run.sweep
    for row in rows:
        row["job"] = found.job
        row["command"] = " ".join([command_line(), *map(shlex.quote, found.more)])
        for note in found.notes if run.kind == "eval" else []:
            add_note(row, note)
    if not run.first():
        return rows[0]
    remarks = [text.lstrip("+") for text in found.more] + (list(found.notes) if sweep else [])
    path = ""
    for row in rows:
        # First the row, then what is said about it: whoever reads along may have gone.
        path = _written(run, row)
        if run.aloud:
            say(" | ".join([summary_line(row), *remarks]))
    if not sweep:
        print(f"{'row' if len(rows) == 1 else 'rows'}: {path}", flush=True)
    if rows[0].get("status") == "failed":  # it ran, and what it measured is no number
        if not sweep:
            raise SystemExit(complain(str(rows[0]["error"])))
        State.failed_jobs += 1
    return rows[0]


def _written(run: _Run, row: Row) -> str:
    """Writes a row down and returns where."""
    from hydra.core.hydra_config import HydraConfig

    from zoo.report.words import summary_line
    from zoo.run.launchers import elsewhere

    try:
        return record(row, run.cfg)
    except Exception as error:
        # The disk filled up, or the folder went away: what was measured is still on the screen.
        print(f"{summary_line(row)}\n{json.dumps(row)}", flush=True)
        if elsewhere(HydraConfig.get()):  # the end of this process would tell the sweep nothing
            raise
        raise SystemExit(complain(explain(error) or str(error))) from error


def _taken_over(run: _Run, rows: list[Row]) -> Row:
    """Rows of an earlier run of this job; a sweep has them in its own file, too."""
    from hydra.core.hydra_config import HydraConfig

    from zoo.report.words import summary_line
    from zoo.results.rows import append_row
    from zoo.run.sweep import sweep_rows_path

    for row in rows if run.first() else []:
        if run.sweep:
            State.rows_path = str(sweep_rows_path(HydraConfig.get()))
            append_row(State.rows_path, row)
        if run.aloud:
            say(f"{summary_line(row)} | done before")
    return rows[0]


def _work(kind: str) -> Callable[[DictConfig], list[Row]]:
    """What does a run of a kind; it may give several rows, the first of which stands for it."""
    if kind == "train":
        from zoo.run.train import train

        return lambda cfg: [train(cfg)]
    from zoo.run.evaluate import evaluate_each

    return evaluate_each


def _died(cfg: DictConfig, text: str) -> bool:
    """Says that a process of this run has ended, unless that has been noticed already."""
    if State.rows_path is not None:
        return False
    with contextlib.suppress(Exception):
        record(failed_row(cfg, text), cfg)
    print(f"error: {text}", file=sys.stderr)
    return True


def _overrides(sweep: bool) -> list[str]:
    """The overrides of this run; those of the whole sweep where it is a job of one."""
    from hydra.core.hydra_config import HydraConfig

    from zoo.run.typed import command_words, options

    if not sweep:
        from omegaconf import OmegaConf

        # As typed: what cannot be resolved is told of where it is used.
        typed: Any = OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)
        return list(typed)
    params = HydraConfig.get().sweeper.get("params") or {}  # that an experiment brings along
    return [*(f"{k}={v}" for k, v in params.items()), *options(command_words()[1:])]


def _restore_full_error(value: str | None) -> None:
    if value is None:
        os.environ.pop(_FULL_ERROR, None)
    else:
        os.environ[_FULL_ERROR] = value
