"""The console command `zoo`.

`zoo train` and `zoo eval` are train.py and eval.py behind one name; the other commands show what
there is. Heavy imports happen inside the commands that need them.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

_OVERVIEW = """\
zoo: token reduction for vision transformers

  zoo train OPTION=VALUE ...       train or fine-tune, as python train.py
  zoo eval OPTION=VALUE ...        accuracy, FLOPs, speed, as python eval.py
  zoo list [PATTERN]               the methods; with --selectors what chooses a
                                   tower's tokens, with --models the backbones
  zoo show NAME                    paper, code, arguments of one of them
  zoo report RESULTS [--out DIR]   tables and plots of rows
  zoo calibrate MODEL IMAGES ...   thresholds of merging, from unlabelled images
  zoo doctor                       does this installation compute right?

zoo COMMAND --help says more. Try:
  zoo eval weights=vit_digits reducer=tome schedule.r=4
"""
_HYDRA = ("train", "eval")
_PLAIN = ("list", "show", "report", "calibrate", "doctor")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code.

    Args:
        argv: Arguments without the program's name; default those of the process.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    program = sys.argv[0] if argv is None else "zoo"
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        return _say(_OVERVIEW)
    command, rest = arguments[0], arguments[1:]
    if command in ("-V", "--version"):
        from zoo import __version__

        return _say(f"tokenzoo {__version__}\n")
    if command in ("-sc", "--shell-completion"):
        return _complete(program, rest)
    if command in _HYDRA:
        return _hydra(program, command, rest)
    if command not in _PLAIN:
        from zoo.run.messages import nearest

        hint = nearest(command, (*_HYDRA, *_PLAIN)) or "zoo --help lists the commands"
        if "=" in command:
            hint = f"options come after the command: zoo eval {command}"
        print(f"error: no command {command!r}; {hint}", file=sys.stderr)
        return 2
    from zoo.run.console import written_out

    return written_out(lambda: _plain(command, rest))


def _say(text: str) -> int:
    from zoo.run.console import written_out

    return written_out(lambda: sys.stdout.write(text) * 0)


def _hydra(program: str, command: str, rest: list[str]) -> int:
    import hydra

    from zoo.published import config_folder
    from zoo.run.entry import guarded, job
    from zoo.version import hydra_base

    @hydra.main(**hydra_base(), config_path=str(config_folder()), config_name=command)
    def run(cfg: Any) -> Any:
        return job(command, cfg)

    return guarded(run, command, [program, *rest], shown=[program, command, *rest])


def _complete(program: str, rest: list[str]) -> int:
    """Tab completion: bash hands over the whole line, Hydra completes what follows the command."""
    words = os.environ.get("COMP_LINE", "").split()
    if rest and rest[0].startswith("query="):
        if len(words) < 2 or words[1] not in _HYDRA:
            return _say(" ".join((*_HYDRA, *_PLAIN)) + "\n")
        line = os.environ["COMP_LINE"]
        os.environ["COMP_LINE"] = line.replace(f"{words[1]} ", "", 1)
        return _hydra(program, words[1], ["-sc", *rest])
    return _hydra(program, "eval", ["-sc", *rest])


class _Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        print(f"error: {message}; {self.prog} --help shows the usage", file=sys.stderr)
        raise SystemExit(2)


def _plain(command: str, rest: list[str]) -> int:
    from zoo.cli.catalogue import NoSuchMethod
    from zoo.run.messages import explain

    try:
        arguments = _parser(command).parse_args(rest)
        return _COMMANDS[command](arguments)
    except SystemExit as end:
        return int(end.code or 0)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except NoSuchMethod as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Exception as error:
        message = explain(error)
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        return 2


def _parser(command: str) -> argparse.ArgumentParser:
    if command == "list":
        parser = _Parser("zoo list", description="Lists the methods, selectors or backbones.")
        parser.add_argument(
            "pattern", nargs="?", default="*", help="e.g. '*dinov3*' (shell pattern)"
        )
        what = parser.add_mutually_exclusive_group()
        what.add_argument("--methods", action="store_true", help="methods (the default)")
        what.add_argument("--selectors", action="store_true", help="selectors behind a tower")
        what.add_argument("--models", action="store_true", help="backbones")
        parser.add_argument("--json", action="store_true", help="as JSON")
    elif command == "show":
        parser = _Parser(
            "zoo show", description="Shows paper, code and arguments of a method or a selector."
        )
        parser.add_argument("method", help="a name that zoo list or zoo list --selectors prints")
        parser.add_argument(
            "--selector", action="store_true", help="the selector, where a method is called so too"
        )
        parser.add_argument("--json", action="store_true", help="as JSON")
    elif command == "report":
        parser = _Parser("zoo report", description="Draws tables and plots of result rows.")
        parser.add_argument("results", nargs="+", help=".jsonl files, or folders that hold some")
        parser.add_argument("--out", help="where to write (default: beside the rows)")
        parser.add_argument("--title", help="headline of the report")
    elif command == "calibrate":
        from zoo.cli.calibrate import add_arguments

        parser = _Parser(
            "zoo calibrate", description="Finds thresholds of merging on unlabelled images."
        )
        add_arguments(parser)
    else:
        parser = _Parser("zoo doctor", description="Checks this installation.")
    return parser


def _list(arguments: argparse.Namespace) -> int:
    from zoo.cli.catalogue import entries, methods_table, print_json, select

    if arguments.models:
        from zoo import backbones

        models = [*backbones.works(arguments.pattern), *backbones.elsewhere(arguments.pattern)]
        if not models:
            print(f"error: no backbone matches {arguments.pattern!r}", file=sys.stderr)
            return 2
        if arguments.json:
            print_json(models)
        else:
            print("\n".join(models))
        return 0
    if arguments.selectors:
        from zoo.cli import selectors

        chosen = selectors.select(arguments.pattern)
        if arguments.json:
            print_json([_facts(selectors.entries()[name]) for name in chosen])
        else:
            print(selectors.table(chosen))
        return 0
    names = select(arguments.pattern)
    if arguments.json:
        known = entries()
        print_json([_facts(known[name]) for name in names])
    else:
        print(methods_table(names))
    return 0


def _facts(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key != "doc"}


def _show(arguments: argparse.Namespace) -> int:
    from zoo.cli import selectors
    from zoo.cli.catalogue import entries, entry, page, print_json

    name = arguments.method
    if arguments.selector or (name not in entries() and name in selectors.entries()):
        text = selectors.page(name)  # raises where there is none
        if arguments.json:
            print_json(_facts(selectors.entries()[name]))
        else:
            print(text)
        return 0
    if name not in entries():
        raise selectors.unknown(name)
    if arguments.json:
        print_json(_facts(entry(arguments.method)))
    else:
        print(page(arguments.method))
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from pathlib import Path

    from zoo.report import table, write_report
    from zoo.results.rows import readable_rows

    rows = readable_rows(arguments.results)
    first = Path(arguments.results[0])
    out = Path(arguments.out) if arguments.out else (first if first.is_dir() else first.parent)
    title = {"title": arguments.title} if arguments.title else {}
    folders = (Path(name) for name in arguments.results)
    others = next((f for f in folders if (f / "published.yaml").is_file()), None)
    paths = write_report(rows, out, **title, published=others)
    print(table(rows))
    print(f"report: {paths.html}")
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from zoo.cli.doctor import examine

    return examine()


def _calibrate(arguments: argparse.Namespace) -> int:
    from zoo.cli.calibrate import run

    return run(arguments)


_COMMANDS = {
    "list": _list,
    "show": _show,
    "report": _report,
    "calibrate": _calibrate,
    "doctor": _doctor,
}
