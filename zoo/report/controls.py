"""Controls: dense models that a reducer must beat to be worth its trouble.

A model saves cost without any reducer by taking smaller images, or by being smaller; and part of
what training with a reducer gains is what training longer gains. Rows of the dense model that show
this are told apart here and get names of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from zoo.report.words import describe_tokens, number, tasks

if TYPE_CHECKING:
    from zoo.report.entry import Entry

RESOLUTION, SMALLER, LONGER = "lower resolution", "smaller model", "dense, trained on"
KINDS = (RESOLUTION, SMALLER, LONGER)


def was_trained_here(row: Mapping[str, Any]) -> bool:
    """Whether the row is the result of a training run, rather than of given weights."""
    return "train" in tasks(row)


def pixels(entry: Entry) -> float:
    """Pixels of the input, 0 where they are not known."""
    size = entry.row.get("img_size")
    sides = list(size) if isinstance(size, Sequence) and not isinstance(size, str) else [size] * 2
    known = [number(side) for side in sides]
    return math.prod(side or 0.0 for side in known)


def main_dense(members: Sequence[Entry]) -> Entry | None:
    """The dense model of one backbone and data that the reduced ones are compared with.

    The one that most of them are compared with; without any, given weights before retrained ones,
    then the largest input, then the latest.
    """
    used = [e.reference_id for e in members if not e.dense and e.reference_id is not None]
    dense = [e for e in members if e.dense]
    return max(
        dense,
        key=lambda e: (used.count(e.id), not was_trained_here(e.row), pixels(e), e.id),
        default=None,
    )


def name_controls(members: Sequence[Entry], main: Entry | None) -> None:
    """Tell the controls among the dense entries of one backbone and data from the dense model."""
    if main is None:
        return
    used = {e.reference_id for e in members if not e.dense}
    for entry in members:
        # What reduced models of its own input size are compared with is no control.
        if not entry.dense or entry is main or entry.id in used:
            continue
        if pixels(entry) < pixels(main):
            size, tokens = entry.row.get("img_size"), describe_tokens(entry.tokens)
            entry.control, entry.name = RESOLUTION, RESOLUTION
            side = "x".join(map(str, size)) if isinstance(size, Sequence) else str(size)
            entry.budget = f"{side} px" if size else tokens
        elif was_trained_here(entry.row):
            entry.control, entry.name = LONGER, LONGER
        else:
            continue
        against(entry, main)


def against(entry: Entry, main: Entry) -> None:
    """Measure a control against the dense model."""
    entry.reference_id, entry.reference_top1 = main.id, main.top1
    entry.reference_quality, entry.reference_gmacs = main.quality, main.gmacs
    for name, speed in entry.speeds.items():
        base = main.speeds.get(name)
        entry.speeds[name] = replace(speed, dense=base.rate if base else None)


def guests(
    main: Entry, groups: Sequence[tuple[Entry | None, str]], new_id: Callable[[], int]
) -> list[Entry]:
    """Copies of smaller dense models on the same data, to stand beside the models of `main`.

    Args:
        main: The dense model of the view.
        groups: The dense model and the data of every group.
        new_id: Gives numbers that no entry has.
    """
    found = []
    for other, data in groups:
        if other is None or data != main.data or other.backbone == main.backbone:
            continue
        if not other.measured or other.gmacs is None or other.gmacs >= (main.gmacs or 0):
            continue
        copy = replace(
            other,
            id=new_id(),
            name=SMALLER,
            budget=other.backbone,
            control=SMALLER,
            trained=False,
            speeds=dict(other.speeds),
            guest=True,
        )
        against(copy, main)
        found.append(copy)
    return found
