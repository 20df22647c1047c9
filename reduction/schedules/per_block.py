"""One count per block, written down or found by a search."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from reduction.checks import boolean, count, finite, is_list, listed
from reduction.counts import Budget
from reduction.errors import ZooError
from reduction.schedules.base import Schedule


class PerBlock(Schedule):
    """One count per block, as a list or from a JSON file.

    Args:
        keep: Tokens to keep after each block; None in the list means nothing happens there.
        prune: Tokens that survive pruning, before merging leaves `keep` (DiffRate's two lists).
        prefix: How many prefix tokens the counts include; DiffRate's lists count the class token,
            so 1 there.
        file: JSON with "keep" and optionally "prune" and "prefix" instead of the lists.
        strict: See `Schedule`.

    Raises:
        ZooError: If counts are not positive integers, lengths differ, or the file is unreadable.
    """

    name = "per_block"

    def __init__(
        self,
        keep: Sequence[int | None] | None = None,
        prune: Sequence[int | None] | None = None,
        prefix: int = 0,
        file: str | None = None,
        strict: bool = True,
    ) -> None:
        if file is not None:
            if keep is not None or prune is not None:
                raise ZooError("give per_block either lists or a file, not both")
            keep, prune, prefix = _read_counts(file)
        if not is_list(keep) or not keep:
            raise ZooError("per_block needs keep=[...] with one count per block, or file=PATH")
        self.prefix = count("prefix", prefix, 0)
        self.keep = _counts("keep", keep, prefix)
        self.prune = None if prune is None else _counts("prune", prune, prefix)
        if self.prune is not None and len(self.prune) != len(self.keep):
            raise ZooError(f"keep has {len(self.keep)} entries but prune {len(self.prune)}")
        self.file = None  # the lists are the record; a path would not travel with a checkpoint
        self.strict = boolean("strict", strict)

    def budget(self, block: int, depth: int, n: int, n0: int) -> Budget | None:
        if len(self.keep) != depth:
            raise ZooError(f"per_block has {len(self.keep)} counts but the model {depth} blocks")
        keep = self.keep[block]
        prune = self.prune[block] if self.prune else None
        counts = [c - self.prefix for c in (keep, prune) if c is not None]
        if not counts or min(counts) >= n:
            return None
        return Budget(min(counts), None if prune is None else prune - self.prefix)


def _counts(what: str, values: Sequence[int | None], prefix: int) -> list[int | None]:
    for value in listed(what, values, "a list with one count per block"):
        if value is None:
            continue
        if not finite(value) or value != int(value) or value - prefix < 1:
            raise ZooError(
                f"{what} must hold integers of at least {prefix + 1}, got {value!r} in {values!r}"
            )
    return [None if v is None else int(v) for v in values]


def _read_counts(file: str) -> tuple[list[int], list[int] | None, int]:
    try:
        data = json.loads(Path(file).read_text())
        return data["keep"], data.get("prune"), int(data.get("prefix", 0))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ZooError(
            f"cannot read a schedule from {file!r}: expected JSON like {{'keep': [...]}} ({error})"
        ) from error
