"""A bar on stderr for what may take longer than a few seconds, where somebody watches."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import Any, TextIO, TypeVar

T = TypeVar("T")

# Seconds before a bar shows: what is over by then needs none.
_DELAY = 3.0
_wanted: bool | None = None


def show(wanted: bool | None) -> None:
    """Switches bars on or off for this process; None: on where stderr is a terminal."""
    global _wanted
    _wanted = wanted


def shown() -> bool:
    """Whether bars show: they were asked for, or somebody watches."""
    if sys.stderr is None:
        return False
    return sys.stderr.isatty() if _wanted is None else _wanted


def wanted(cfg: Mapping[str, Any]) -> bool | None:
    """What the option `progress` of a configuration asks for, as `show` takes it."""
    asked = cfg.get("progress", "auto")
    return None if asked == "auto" else bool(asked)


def bar(items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
    """Passes items on, counting them in a bar.

    Args:
        items: Anything to go through.
        what: What takes its time, in front of the bar.
        total: How many items there will be; None is their `len`, if they have one.
    """
    if not shown():
        yield from items
        return
    if total is None and isinstance(items, Sized):
        total = len(items)
    with counter(what, total) as count:
        for item in items:
            yield item
            count.update()


def counter(what: str, total: int | None) -> Any:
    """A bar that is moved on by `update()` and ended by `close()`."""
    import tqdm

    tqdm.tqdm.monitor_interval = 0  # no thread beside what is being timed
    return tqdm.tqdm(
        desc=what,
        total=total,
        file=sys.stderr,
        leave=False,
        delay=_DELAY,
        dynamic_ncols=True,
        disable=not shown(),
    )


def say(text: str, file: TextIO | None = None) -> None:
    """Prints a line, to stdout or elsewhere, without tearing the bars apart."""
    file = sys.stdout if file is None else file
    if not shown():
        print(text, flush=True, file=file)
        return
    import tqdm

    with tqdm.tqdm.external_write_mode(file=file):
        print(text, flush=True, file=file)


def batches_of(batches: Any, limit: int | None) -> int | None:
    """How many batches a loader gives until there are `limit` images; None if nobody knows."""
    try:
        found = len(batches)
        if limit is not None:
            found = min(found, -(-limit // int(batches.batch_size)))
    except (TypeError, AttributeError, ZeroDivisionError):
        return None
    return found
