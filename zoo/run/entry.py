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
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from zoo.measure.progress import say, show, wanted
from zoo.run import help
from zoo.run.console import written_out
from zoo.run.done import digest, done_before
from zoo.run.messages import explain, unknown_flag
from zoo.run.outcome import FAILED, INTERRUPTED, USAGE, State, complain, is_first_process
from zoo.run.overrides import for_hydra, prepare
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
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from zoo.run.launchers import elsewhere, join_tasks, speaks
    from zoo.run.schema import check_config
    from zoo.run.sweep import refuse_subprocess_ddp
    from zoo.run.typed import command_words, typed

    # Lightning starts the other processes of a DDP run from sys.argv, and those need the
    # environment as the user left it.
    sys.argv, full_error = command_words(), typed().full_error
    _restore_full_error("1" if full_error else None)
    # Said by libraries to their own authors, on every run.
    warnings.filterwarnings("ignore", message=".*torch.jit.script", category=FutureWarning)
    sweep = HydraConfig.get().mode == RunMode.MULTIRUN
    aloud = speaks(HydraConfig.get())
    overrides, more, notes = _overrides(sweep), list[str](), list[str]()
    what: str | None = None
    try:
        join_tasks()
        if sweep:
            refuse_subprocess_ddp(cfg)
        check_config(cfg, kind, overrides)
        show(wanted(cfg) if aloud else False)
        _check_writable(_results(cfg))
        if cfg.get("trainer") is not None and not sweep:
            from zoo.run.deaths import announce

            announce(partial(_died, cfg))
        if kind == "train":
            os.makedirs(str(cfg.output_dir), exist_ok=True)
        if kind == "eval":
            what = digest(cfg)
            if earlier := done_before(cfg, what):
                return _taken_over(earlier, aloud)
            if sweep:
                check_trained(cfg)
        work = _work(kind)
        with noted(quiet=sweep) as notes:
            if sweep and sweeps_reducers(overrides):
                rows, more = without_class_token(work, cfg, overrides)
            else:
                rows = work(cfg)
    except Skipped as reason:
        rows = [_failed_row(cfg, str(reason), status="skipped")]
    except Exception as error:
        message = explain(error)
        if is_first_process(kind == "train" or cfg.get("trainer") is not None):
            with contextlib.suppress(Exception):  # the error itself is what has to be seen
                _record(_failed_row(cfg, message or f"{type(error).__name__}: {error}"), cfg)
        if full_error and not sweep:
            raise
        if message is None:
            traceback.print_exc()
        elif sweep and aloud:
            say(f"error: {message} [{' '.join(HydraConfig.get().overrides.task)}]", sys.stderr)
        if not sweep:
            raise SystemExit(FAILED if message is None else complain(message)) from error
        State.failed_jobs += 1
        return {"status": "failed"}
    finally:
        os.environ[_FULL_ERROR] = "1"
    for row in rows:
        row["job"] = what
        row["command"] = " ".join([command_line(), *map(shlex.quote, more)])
        for note in notes if kind == "eval" else []:
            add_note(row, note)
    if not is_first_process(kind == "train" or cfg.get("trainer") is not None):
        return rows[0]
    from zoo.report.words import summary_line

    remarks = [text.lstrip("+") for text in more] + (notes if sweep else [])
    path = ""
    for row in rows:
        # First the row, then what is said about it: whoever reads along may have gone.
        try:
            path = _record(row, cfg)
        except Exception as error:
            # The disk filled up, or the folder went away: what was measured is still on the screen.
            print(f"{summary_line(row)}\n{json.dumps(row)}", flush=True)
            if elsewhere(HydraConfig.get()):  # the end of this process would tell the sweep nothing
                raise
            raise SystemExit(complain(explain(error) or str(error))) from error
        if aloud:
            say(" | ".join([summary_line(row), *remarks]))
    if not sweep:
        print(f"{'row' if len(rows) == 1 else 'rows'}: {path}", flush=True)
    if rows[0].get("status") == "failed":  # it ran, and what it measured is no number
        if not sweep:
            raise SystemExit(complain(str(rows[0]["error"])))
        State.failed_jobs += 1
    return rows[0]


def _taken_over(rows: list[Row], aloud: bool) -> Row:
    """Rows of an earlier run of this job; a sweep has them in its own file, too."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from zoo.report.words import summary_line
    from zoo.results.rows import append_row
    from zoo.run.sweep import sweep_rows_path

    for row in rows:
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            State.rows_path = str(sweep_rows_path(HydraConfig.get()))
            append_row(State.rows_path, row)
        if aloud:
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
        _record(_failed_row(cfg, text), cfg)
    print(f"error: {text}", file=sys.stderr)
    return True


def command_line() -> str:
    """Returns the command that repeats this one run, also from within a sweep."""
    from hydra.core.hydra_config import HydraConfig

    from zoo.run.typed import command_words

    argv = command_words()
    program = os.path.basename(argv[0])
    if program.endswith(".py"):
        start = ["python", program] if program != "__main__.py" else ["python", "-m", "zoo"]
    else:
        start = [program]
    if argv[1:2] and argv[1] in ("train", "eval"):
        start.append(argv[1])
    return shlex.join([*start, *HydraConfig.get().overrides.task])


def _overrides(sweep: bool) -> list[str]:
    """The overrides of this run; those of the whole sweep where it is a job of one."""
    from hydra.core.hydra_config import HydraConfig

    from zoo.run.typed import command_words, options

    if not sweep:
        return list(HydraConfig.get().overrides.task)
    params = HydraConfig.get().sweeper.get("params") or {}  # that an experiment brings along
    return [*(f"{k}={v}" for k, v in params.items()), *options(command_words()[1:])]


def _results(cfg: DictConfig) -> str:
    return str(cfg.get("results") or "results/local/rows.jsonl")


def _check_writable(path: str) -> None:
    """Refuses a run whose row could not be written, before it costs hours.

    Raises:
        ZooError: The file cannot be opened for appending.
    """
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(path, "ab"):
            pass
    except OSError as error:
        from zoo.errors import ZooError

        raise ZooError(f"results={path} cannot be written: {error.strerror}") from error


def _record(row: Row, cfg: DictConfig) -> str:
    """Appends the row to the collected rows and, in a sweep, to the sweep's own file."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from zoo.results.rows import append_row
    from zoo.run.sweep import sweep_rows_path

    path = _results(cfg)
    append_row(path, row)
    State.rows_path = path
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        State.rows_path = str(sweep_rows_path(HydraConfig.get()))
        append_row(State.rows_path, row)
    return path


def _failed_row(cfg: DictConfig, message: str, status: str = "failed") -> Row:
    """A row that says what was tried; it must be writable whatever went wrong."""
    from omegaconf import OmegaConf

    from zoo.results.rows import new_row

    def plain(key: str) -> Any:
        try:
            node = OmegaConf.select(cfg, key)
            return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
        except Exception:
            return None

    def named(group: str) -> Any:
        """The chosen option as rows hold it: registry name and arguments."""
        node, name = plain(group), _choice(group)
        if not isinstance(node, dict) or name in (None, "none"):
            return None
        if name == "default":  # of the schedules: r alone is short for constant_r
            name, node = "constant_r", node if node.get("r") is not None else {}
        args = {key: value for key, value in node.items() if not key.startswith("_")}
        return {"name": name, **args} if args or group != "schedule" else None

    task, weights, backbone = plain("task") or "train", plain("weights"), plain("backbone.name")
    reducer = named("reducer")
    return new_row(
        status=status,
        error=message,
        command=command_line(),
        task=[task] if isinstance(task, str) else task,
        method=reducer["name"] if reducer else "none",
        reducer=reducer,
        # Without a backbone the weights bring theirs, but they may be what failed to load.
        backbone=str(backbone or weights or "").partition(".")[0] or None,
        dataset=plain("data.name"),
        schedule=named("schedule") if reducer else None,
        seed=plain("seed"),
        weights=None if weights is None else str(weights),
    )


def _choice(group: str) -> str | None:
    """The option of a group that was chosen, e.g. "tome" for the group "reducer"."""
    from hydra.core.hydra_config import HydraConfig

    choice = HydraConfig.get().runtime.choices.get(group)
    return None if choice is None else str(choice)


def _restore_full_error(value: str | None) -> None:
    if value is None:
        os.environ.pop(_FULL_ERROR, None)
    else:
        os.environ[_FULL_ERROR] = value
