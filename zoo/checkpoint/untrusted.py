"""What a file from somewhere else may hold: plain values, in bounded size, each key once."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from zoo.errors import BadCheckpoint

MOST_BYTES = 1 << 23  # of a JSON file; names of 20 000 classes take a tenth
_MOST_VALUES = 1 << 18
_MOST_LEVELS = 16
_MOST_DIGITS = 1 << 63


def short(value: Any, limit: int = 80) -> str:
    """A value for a message: one line of ASCII, cut where it is long."""
    try:
        text = ascii(value[:limit] if isinstance(value, str) else value)
    except (RecursionError, ValueError, MemoryError):
        text = type(value).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."


def cut(text: object, limit: int = 400) -> str:
    """A message that may repeat what a file holds: one printable line, cut where it is long."""
    line = " ".join(str(text).split())[:limit]
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
    return line if len(line) < limit else line[: limit - 3] + "..."


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        BadCheckpoint: missing, too large, not JSON, with the same key twice, or too deep.
    """
    if not path.is_file():  # nor a pipe that never ends
        raise BadCheckpoint(f"{path}: no such file")
    if path.stat().st_size > MOST_BYTES:
        raise BadCheckpoint(
            f"{path}: refused, it has {path.stat().st_size / 1e6:.0f} MB; a recipe has a few kB"
        )
    try:
        value = json.loads(
            path.read_text(encoding="utf-8"), object_pairs_hook=_each_once, parse_constant=_finite
        )
    except BadCheckpoint as error:
        raise BadCheckpoint(f"{path}: {error}") from error
    except OSError as error:
        raise BadCheckpoint(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError, MemoryError) as error:
        reason = short(str(error) or type(error).__name__)[1:-1]
        raise BadCheckpoint(
            f"{path}: not valid JSON ({reason}); it was cut short or edited"
        ) from error
    check_plain(value, str(path))
    return value


def check_plain(value: Any, where: str) -> None:
    """Refuse what no recipe holds.

    Args:
        value: What was read, from JSON or a checkpoint.
        where: For the message.

    Raises:
        BadCheckpoint: It is too deep or too large, or holds numbers that are not finite, or values
            that are not plain.
    """
    # Level by level: a pickle may refer to one list many times over, which a walk into the depth
    # would follow for ever.
    level, seen = [value], 0
    for _ in range(_MOST_LEVELS):
        following: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                following += item.keys()
                following += item.values()
            elif isinstance(item, list | tuple):
                following += item
            elif problem := _not_plain(item):
                raise BadCheckpoint(f"{where}: {problem}; expected a recipe of plain values")
            seen += 1
            if len(following) + seen > _MOST_VALUES:
                raise BadCheckpoint(f"{where}: refused, it holds over {_MOST_VALUES} values")
        if not following:
            return
        level = following
    raise BadCheckpoint(f"{where}: refused, it is nested over {_MOST_LEVELS} levels deep")


def _not_plain(item: Any) -> str:
    if isinstance(item, bool) or item is None or isinstance(item, str):
        return ""
    if isinstance(item, int):
        return "" if abs(item) <= _MOST_DIGITS else f"{short(item, 24)} is no number to work with"
    if isinstance(item, float):
        return "" if math.isfinite(item) else f"{item} is no number to work with"
    return f"it holds a {type(item).__name__}"


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [key for key, _ in pairs]
        twice = next(key for key in names if names.count(key) > 1)
        raise BadCheckpoint(f"the key {short(twice)} stands there twice")
    return found


def _finite(text: str) -> Any:
    raise BadCheckpoint(f"not valid JSON ({text} is no number to work with)")
