"""K-Medoids of Haurum et al.: logits, gradients, medoids in order, and the last assignment."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

import zoo
from reduction.counts import Step
from reduction.methods.kmedoids_haurum import KMedoidsHaurum
from tests.parity.fixture import Case, Fixture
from tests.parity.runner import handles
from tests.parity.stages import run_cases
from zoo.model.stream import Info


class Started(KMedoidsHaurum):
    """With the first medoid of each block given instead of drawn."""

    def __init__(self, starts: dict[int, int], **args: Any) -> None:
        super().__init__(**args)
        self.starts = starts

    def first(self, n: int, step: Step) -> int:
        return self.starts.get(step.block, 0)


def schedule(config: dict[str, Any], depth: int) -> dict[str, Any]:
    """One rate compounds; a longer list means counts in that code base."""
    rate, blocks = config["keep_rate"], config["reduction_loc"]
    if len(rate) == 1:
        return {"name": "keep_rate", "rate": rate[0], "blocks": blocks, "strict": False}
    keep: list[int | None] = [None] * depth
    for block, count in zip(blocks, rate, strict=True):
        keep[block] = int(count)
    return {"name": "per_block", "keep": keep, "strict": False}


def check_medoids(case: Case, fx: Fixture, info: Info) -> None:
    """Medoids by patch and by position, and the group of every token."""
    for stage, block in enumerate(fx.info["stage_blocks"]):
        stored = fx.group(f"stage{stage}.")
        before = info.trace[block - 1] if block else None
        t = info.trace[block]
        assert t.origin is not None and t.source is not None
        case.equal(f"stage{stage}.medoids_abs", t.origin, stored["medoids_abs"])
        came_from = t.source.new_tensor(range(t.source.shape[1])).expand_as(t.source)
        origin = came_from
        if before is not None:
            assert before.origin is not None and before.source is not None
            origin, came_from = before.origin, before.source
        rel = origin.gather(1, stored["medoids_rel"])
        case.equal(f"stage{stage}.medoids_rel", rel, t.origin)
        slot = stored["assign"].gather(1, came_from)
        case.equal(f"stage{stage}.assign", t.source, slot)


@handles("kmedoids")
def kmedoids(fx: Fixture) -> Iterator[Case]:
    config = fx.config
    sched = schedule(config, fx.info["timm"]["kwargs"]["depth"])
    args: dict[str, Any] = {"iterations": config.get("cluster_iters", 3)}
    reducer: KMedoidsHaurum = KMedoidsHaurum(**args)
    if config.get("equal_weight"):
        # The first medoid is drawn there by numpy; find the draw, then check all that follows.
        reducer = find_starts(fx, sched, args)
    yield from run_cases(fx, reducer, sched)
    model = zoo.wrap(fx.backbone(), reducer, sched).eval()
    with torch.no_grad():
        _, info = model(fx.images, return_info="trace")
    case = Case(fx.name, "medoids")
    check_medoids(case, fx, info)
    yield case


def find_starts(fx: Fixture, sched: dict[str, Any], args: dict[str, Any]) -> KMedoidsHaurum:
    """The reducer whose draws lead to the stored medoids, block by block."""
    starts: dict[int, int] = {}
    model = zoo.wrap(fx.backbone(), Started(starts, equal_weight=True, **args), sched).eval()
    for stage, block in enumerate(fx.info["stage_blocks"]):
        goal = fx.tensors[f"stage{stage}.medoids_abs"]
        for start in range(fx.tensors[f"stage{stage}.assign"].shape[1]):
            starts[block] = start
            with torch.no_grad():
                _, info = model(fx.images, return_info="trace")
            if torch.equal(info.trace[block].origin, goal):
                break
    assert isinstance(model.reducer, KMedoidsHaurum)
    return model.reducer
