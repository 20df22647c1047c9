"""ToFu: the two public ports, by share of the sequence and by count."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import reduction
from tests.parity.fixture import Case, Fixture
from tests.parity.pitome import ratio_or_count
from tests.parity.runner import handles
from tests.parity.stages import run_cases


@handles("tofu")
def tofu(fx: Fixture) -> Iterator[Case]:
    depth = fx.info["timm"]["kwargs"]["depth"]
    # The ports never track sizes, so their prop_attn, whatever its value, does nothing.
    reducer: dict[str, Any] = {"name": "tofu", "mlerp": "port"}
    strategies = fx.config.get("strategies")
    if strategies is not None:
        if "mean" in strategies:
            reducer["mlerp"] = "mean"
        listed = ["prune" if s == "prune" else "merge" for s in strategies]
        built = reduction.create(**reducer)
        if listed != ["prune" if built.prunes(b, depth) else "merge" for b in range(depth)]:
            reducer["switch"] = listed
    yield from run_cases(fx, reducer, ratio_or_count(fx, prefix=1))
