"""Top-K, EViT (official and Haurum et al.) and the fixed patterns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from reduction.methods.evit import keep_rate_at
from tests.parity.fixture import Case, Fixture
from tests.parity.runner import handles
from tests.parity.stages import run_cases


def stage_rates(config: dict[str, Any]) -> dict[str, Any]:
    """Haurum et al.: one rate compounds; a list holds shares of the initial count."""
    rate = config["keep_rate"]
    return {
        "name": "keep_rate",
        "rate": rate[0] if len(rate) == 1 else rate,
        "blocks": config["reduction_loc"],
    }


@handles("topk", "evit")
def stagewise(fx: Fixture) -> Iterator[Case]:
    yield from run_cases(fx, fx.method, stage_rates(fx.config))


@handles("evit (official)")
def evit_official(fx: Fixture) -> Iterator[Case]:
    config = fx.config
    rate = config["keep_rate"]
    schedule = {
        "name": "keep_rate",
        "rate": rate[0] if isinstance(rate, list) and len(rate) == 1 else rate,
        "blocks": config["drop_loc"],
        "rounding": "ceil",
        "of": "current",
    }
    yield from run_cases(fx, {"name": "evit", "fuse": config["fuse_token"]}, schedule)


@handles("evit keep-rate schedule")
def evit_schedule(fx: Fixture) -> Iterator[Case]:
    for i, spec in enumerate(fx.info["cases"]):
        case = Case(fx.name, f"schedule{i}", tolerance=float(fx.info["tolerance"]))
        per_epoch = spec["iters_per_epoch"]
        for epoch, iteration, rate in spec["rows_epoch_iter_keep"]:
            ours = keep_rate_at(
                epoch * per_epoch + iteration,
                spec["base_keep_rate"],
                spec["shrink_start_epoch"] * per_epoch,
                spec["shrink_epochs"] * per_epoch,
            )
            case.gap = max(case.gap, abs(ours - rate))
            case.equal(
                f"epoch {epoch} iteration {iteration}", abs(ours - rate) <= case.tolerance, True
            )
        yield case


@handles("heuristic")
def heuristic(fx: Fixture) -> Iterator[Case]:
    config = fx.config
    pattern = {"linf": "linf", "inf": "linf"}.get(
        config["heuristic_pattern"], config["heuristic_pattern"]
    )
    if config.get("not_contiguous"):
        schedule = stage_rates(config)
    else:
        blocks = config["reduction_loc"]
        schedule = {
            "name": "radius",
            "pattern": pattern,
            "start": min(blocks),
            "stop": max(blocks),
            "min_radius": config.get("min_radius", 1.0),
        }
    # The reference masks keys and keeps the sequence length; here tokens are removed.
    yield from run_cases(fx, {"name": "heuristic", "pattern": pattern}, schedule, counts=False)
