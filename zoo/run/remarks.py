"""What a job is done with beside what was typed, and what its row says of that."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omegaconf import DictConfig

Row = dict[str, Any]


class Skipped(Exception):
    """A job of a sweep asks for what cannot be, as is in the nature of sweeps."""


def sweeps_reducers(typed: Sequence[str]) -> bool:
    """Whether a command runs several reducers; then nobody has chosen each for this model."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    overrides = OverridesParser.create().parse_overrides([t for t in typed if t[:1] != "-"])
    return any(o.key_or_group == "reducer" and o.is_sweep_override() for o in overrides)


def check_trained(cfg: DictConfig) -> None:
    """Leaves out a method that needs training, where `untrained=skip` and the weights bring none.

    Raises:
        Skipped: So it is.
    """
    from zoo.checkpoint import find, read_config

    reducer = cfg.get("reducer")
    if cfg.get("untrained", "run") != "skip" or reducer is None:
        return
    from hydra.utils import get_class

    cls: Any = get_class(str(reducer._target_)) if "methods" in str(reducer._target_) else None
    if cls is None or not cls.card.trained:
        return
    source = find(str(cfg.weights)) if cfg.get("weights") else None
    stored = read_config(source)["reducer"] if source is not None and source.is_dir() else None
    if (stored or {}).get("name") != cls.name:
        raise Skipped(f"needs training ({cls.card.training}); untrained=run measures it as it is")


def without_class_token(
    work: Callable[[DictConfig], list[Row]], cfg: DictConfig, typed: Sequence[str]
) -> tuple[list[Row], list[str]]:
    """Does a job of a sweep over reducers; on a model without class token as far as that goes.

    A method that ranks by the class token takes another score there, if it has one and the command
    does not name one.

    Args:
        work: Trains or evaluates.
        cfg: The composed configuration.
        typed: The overrides of the sweep.

    Returns:
        The rows, and what has to be typed beside the overrides to get it.

    Raises:
        Skipped: The method needs a class token, or cannot keep to a budget in costs.
    """
    from omegaconf import OmegaConf

    from zoo.errors import NoClassToken, UnreachableBudget

    try:
        return work(cfg), []
    except UnreachableBudget as error:
        # A number of tokens was typed for these methods; a share of the cost is asked of any.
        if "Target" not in str(cfg.schedule.get("_target_")):
            raise
        raise Skipped(str(error)) from error
    except NoClassToken as error:
        chosen = {text.lstrip("+").partition("=")[0] for text in typed}
        names = {"reducer.score", *(f"reducer.{name}" for name in error.instead)}
        if not error.instead or chosen & names:
            raise Skipped(str(error)) from error
        more = []
        for name, value in error.instead.items():
            plus = "" if name in cfg.reducer else "+"
            more.append(f"{plus}reducer.{name}={value}")
            OmegaConf.update(cfg, f"reducer.{name}", value, force_add=True)
    rows = work(cfg)
    words = ", ".join(text.lstrip("+").removeprefix("reducer.") for text in more)
    for row in rows:
        add_note(row, f"{words}, as the model has no class token")
    return rows, more


@contextlib.contextmanager
def noted(quiet: bool) -> Iterator[list[str]]:
    """Within, collects what loading weights has to say: parts without any, resampled positions.

    Args:
        quiet: Keep the warnings back: the row says it, and the line of the job.
    """
    found: list[str] = []

    def look(record: logging.LogRecord) -> bool:
        note = getattr(record, "note", None)
        if note is not None and note not in found:
            found.append(note)
        return note is None or not quiet

    loggers = [logging.getLogger(f"zoo.checkpoint.{name}") for name in ("weights", "positions")]
    for logger in loggers:
        logger.addFilter(look)
    try:
        yield found
    finally:
        for logger in loggers:
            logger.removeFilter(look)


def add_note(row: Row, text: str) -> None:
    """Adds to what a row says in words."""
    row["notes"] = "; ".join(note for note in (row.get("notes"), text) if note)
