"""What single rows say about speed, fidelity and cost, in the form that entries hold it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from zoo.report.notes import setting
from zoo.report.words import is_dense, number, total_gmacs

Row = dict[str, Any]


@dataclass(frozen=True)
class Speed:
    """Throughput of one entry in one setting; `dense` is the unreduced model's, if known."""

    rate: float
    dense: float | None
    row: Row
    memory: float | None = None  # MiB at most
    memory_dense: float | None = None

    @property
    def speedup(self) -> float | None:
        """How many times faster than the dense model."""
        return self.rate / self.dense if self.dense else None

    @property
    def efficiency(self) -> float | None:
        """The speed-up over what the arithmetic promises: 1 is all of it."""
        whole, total = number(self.row.get("gmacs_dense")), total_gmacs(self.row)
        if self.speedup is None or not whole or not total:
            return None
        return self.speedup * total / whole


def speeds(row: Row) -> dict[str, Speed]:
    """What a row says about speed: one setting per batch size."""
    several = row.get("by_batch")
    parts = several if isinstance(several, Sequence) and several else [row]
    found = {}
    for part in parts:
        rate = number(part.get("imgs_per_s")) if isinstance(part, Mapping) else None
        if rate:
            keys = ("imgs_per_s_dense", "peak_mem_mb", "peak_mem_mb_dense")
            dense, memory, memory_dense = (number(part.get(key)) for key in keys)
            one = {**row, "batch": part.get("batch")}
            found[setting(one)] = Speed(rate, dense, one, memory, memory_dense)
    return found


def fidelity(rows: Sequence[Row]) -> dict[str, float]:
    """Agreement, divergence and cosine of the last row that measured them."""
    for row in reversed(rows):
        given = row.get("fidelity")
        if isinstance(given, Mapping):
            found = {name: number(given.get(name)) for name in ("agreement", "kl", "cosine")}
            return {name: value for name, value in found.items() if value is not None}
    return {}


def reducer_share(row: Row) -> float | None:
    """Percent of the GMACs that are the reducer's own; None for dense models."""
    gmacs, total = row.get("gmacs"), total_gmacs(row)
    part = number(gmacs.get("reducer")) if isinstance(gmacs, Mapping) else None
    return None if part is None or not total or is_dense(row) else 100 * part / total
