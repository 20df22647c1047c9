"""PiToMe: the official ratio form for class tokens and for MAE, and the count form."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import reduction
from tests.parity.fixture import Case, Fixture
from tests.parity.runner import handles
from tests.parity.stages import run_cases


def ratio_or_count(fx: Fixture, prefix: int = 0) -> dict[str, Any]:
    """Share of the current tokens in every block, or removals per block in ToMe's spellings."""
    config = fx.config
    if "ratio" in config:
        rule = {"of": "current", "rounding": "ceil", "blocks": "all", "prefix": prefix}
        return {"name": "keep_rate", "rate": config["ratio"], "strict": False, **rule}
    r, inflection = config["r"], None
    if config.get("r_type") == "tuple":
        r, inflection = r
    return {"name": "constant_r", "r": r, "inflection": inflection, "strict": False}


@handles("pitome")
def pitome(fx: Fixture) -> Iterator[Case]:
    config, depth = fx.config, fx.info["timm"]["kwargs"]["depth"]
    reducer: dict[str, Any] = {"name": "pitome"}
    if config.get("variant") == "mae":
        reducer["mode"] = "pitome_first"
    built = reduction.create(**reducer)
    # Lists are passed on only where they differ from what the variant's rules give.
    modes = config.get("modes")
    if modes not in (None, [built.mode_of(b, depth) for b in range(depth)]):
        reducer["mode"] = modes
    margins = config.get("margins")
    if margins not in (None, [built.margin_of(b, depth) for b in range(depth)]):
        reducer["margin"] = margins
    yield from run_cases(fx, reducer, ratio_or_count(fx))
