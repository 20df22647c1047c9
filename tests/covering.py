"""Which cases of a cross product run in the fast tier: a few, the same ones every time.

The others are marked slow, so that `make test-all` runs every single one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest

from tests.cases import CORE, METHODS, Row


def crossed(
    ones: Iterable[Any], others: Iterable[Any], kind: Callable[[Any], object] = lambda other: other
) -> list[Any]:
    """Every pair, as parameters; the fast ones are those in which every one meets every kind.

    Within a kind the members take turns, so that each appears where there are enough ones.

    Args:
        ones: Rows or names.
        others: Likewise.
        kind: What an other one is a member of; itself, and all pairs are fast.
    """
    kinds: dict[object, list[Any]] = {}
    for other in others:
        kinds.setdefault(kind(other), []).append(other)
    found = []
    for i, one in enumerate(ones):
        for members in kinds.values():
            for j, other in enumerate(members):
                slow = () if j == i % len(members) else pytest.mark.slow
                found.append(pytest.param(one, other, id=f"{_id(one)}-{_id(other)}", marks=slow))
    return found


def by_turns(rows: Sequence[Row], turn: int, of: int = 3) -> list[Any]:
    """Rows as parameters: the first of every method is fast, the further ones by turns.

    Args:
        rows: Of methods.
        turn: Whose turn it is, 0 to `of` - 1: another one in every test of a module.
        of: How many turns there are.
    """
    seen: set[str] = set()
    found, further = [], 0
    for row in rows:
        fast = row.name not in seen or further % of == turn % of
        further += row.name in seen
        seen.add(row.name)
        found.append(pytest.param(row, id=row.id, marks=() if fast else pytest.mark.slow))
    return found


def parts(rows: Sequence[Row], part: int, of: int = 3) -> list[Any]:
    """Rows as parameters: fast are the first ones of a part of the methods.

    Args:
        rows: Of methods.
        part: Which, 0 to `of` - 1; the others have the other methods.
        of: How many parts there are.
    """
    names = list(dict.fromkeys(row.name for row in rows))
    fast = {id(next(r for r in rows if r.name == name)) for name in names[part::of]}
    return [
        pytest.param(row, id=row.id, marks=() if id(row) in fast else pytest.mark.slow)
        for row in rows
    ]


def pairs() -> list[Any]:
    """Every method on every adapter; further rows of a method on the plain model only."""
    first = {row.name: row for row in reversed(METHODS)}
    further = [row for row in METHODS if row is not first[row.name]]
    each = crossed(first.values(), CORE, _KINDS.get)
    return each + [pytest.param(row, "plain", id=f"{row.id}-plain") for row in further]


#: Backbones that differ in the same respect.
_KINDS = {"distilled": "prefix", "registers": "prefix", "gap": "no class", "map": "no class"}
_KINDS |= {"plain": "plain", "eva02": "rope", "dinov3": "rope", "rope_mixed": "rope"}
_KINDS |= {"jumbo": "jumbo"}


def _id(value: Any) -> str:
    return str(getattr(value, "id", value))


def every(values: Sequence[Any], nth: int) -> list[Any]:
    """Values as parameters, of which every n-th is fast."""
    marks = [() if i % nth == 0 else pytest.mark.slow for i in range(len(values))]
    return [pytest.param(v, id=_id(v), marks=m) for v, m in zip(values, marks, strict=True)]
