"""Fixed patterns: keep what is near the centre of the image."""

from __future__ import annotations

import torch

from reduction.assignment import Keep
from reduction.base import Card, Reducer
from reduction.checks import one_of
from reduction.counts import Step
from reduction.functional.patterns import PATTERNS, distances, ring_counts
from reduction.registry import register
from reduction.tokens import Signals, Tokens


@register("heuristic")
class Heuristic(Reducer):
    """Keep the patches nearest to the centre in the l1, l2 or l-infinity sense.

    Only whole rings are kept: of all rings, the one whose count is closest to the budget. The
    official code masks the others as keys and saves nothing; here they are removed, which gives
    the same output.

    Args:
        pattern: "l1", "l2" or "linf".

    Raises:
        ZooError: If the pattern is unknown.

    References:
        Haurum et al., ICCVW 2023, arXiv 2308.04657; official code
        github.com/JoakimHaurum/TokenReduction (MIT).
    """

    card = Card(
        title="Which Tokens to Use? Investigating Token Reduction in Vision Transformers",
        authors="Haurum et al.",
        venue="ICCVW",
        year=2023,
        arxiv="2308.04657",
        code="https://github.com/JoakimHaurum/TokenReduction",
        licence="MIT",
        kind="pattern",
        training="fine-tuning recommended",
        note="Ignores the image; for data with centred objects.",
    )
    site = "pre"
    drops = True
    needs = frozenset({"origin"})
    # They stand nowhere, and whole rings are counted.
    added_tokens = "spare"

    def __init__(self, pattern: str = "l2") -> None:
        super().__init__()
        self.pattern = one_of("pattern", pattern, PATTERNS)

    def count(self, n: int, step: Step) -> int:
        rings: tuple[int, ...] = ring_counts(self.pattern, step.grid)
        # min() takes the first of equals, as the official code does.
        return min(n, min(rings, key=lambda count: abs(count - step.keep)))

    def assign(self, t: Tokens, s: Signals, step: Step) -> Keep:
        assert t.origin is not None
        z = torch.tensor(distances(self.pattern, step.grid), device=t.x.device)
        # Tokens that stand for no patch (added by a plugin) have no distance: they stay.
        near = torch.where(t.origin < 0, -1.0, z[t.origin.clamp_min(0)])
        kept = near.topk(self.count(t.n, step), dim=1, largest=False, sorted=False).indices
        return Keep(kept.sort(dim=1).values)
