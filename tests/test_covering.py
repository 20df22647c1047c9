"""The fast tier leaves no method and no family out, and the slow one no pair."""

from __future__ import annotations

from typing import Any

from tests.cases import CORE, METHODS
from tests.covering import by_turns, crossed, every, pairs, parts
from tests.families import FAMILIES, first_rows, kind_of


def fast(parameters: list[Any]) -> list[tuple[Any, ...]]:
    return [p.values for p in parameters if not p.marks]


def test_every_method_meets_every_kind_of_family() -> None:
    pairs = crossed(first_rows(), FAMILIES, kind_of)
    assert len({p.values for p in pairs}) == len(pairs) == len(first_rows()) * len(FAMILIES)
    met = {(row.name, kind_of(name)) for row, name in fast(pairs)}
    assert met == {(row.name, kind_of(name)) for row in first_rows() for name in FAMILIES}
    assert {name for _, name in fast(pairs)} == set(FAMILIES)
    assert 4 * len(fast(pairs)) < len(pairs) * 1.5


def test_every_row_has_its_turn() -> None:
    turns = [{row for (row,) in fast(by_turns(METHODS, turn))} for turn in range(3)]
    assert set.union(*turns) == set(METHODS)
    assert set.intersection(*turns) == set(first_rows())
    for turn in range(3):
        assert [p.values[0] for p in by_turns(METHODS, turn)] == METHODS


def test_every_method_is_in_one_half() -> None:
    found = [{row for (row,) in fast(parts(METHODS, part))} for part in range(3)]
    assert set.union(*found) == set(first_rows()) and sum(map(len, found)) == len(first_rows())


def test_every_third_is_fast_and_all_are_there() -> None:
    assert fast(every("abcdefg", 3)) == [("a",), ("d",), ("g",)]
    assert [p.values for p in every("abc", 3)] == [("a",), ("b",), ("c",)]


def test_every_backbone_of_the_matrix_is_met_and_every_row_is_there() -> None:
    assert {name for _, name in fast(pairs())} == set(CORE)
    assert {row for row, _ in fast(pairs())} == set(METHODS)
    assert {p.values for p in pairs()} >= {(row, n) for row in first_rows() for n in CORE}
