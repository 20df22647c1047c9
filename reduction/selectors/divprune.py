"""DivPrune: patches as far from each other as possible."""

from __future__ import annotations

import torch

from reduction.base import Card
from reduction.checks import one_of
from reduction.functional.portable import kth_smallest
from reduction.selection.base import Compat, Selection, Selector, choose, whole_number
from reduction.selection.given import Given
from reduction.selection.ranking import similarity, spread_from
from reduction.selection.registry import register_selector

STARTS = ("isolated", "attention")
OBJECTIVES = ("min", "sum")


@register_selector("divprune")
class DivPrune(Selector):
    """Greedy max-min: each step takes the patch farthest (cosine) from the nearest chosen one.

    Args:
        start: First patch: "isolated", the one farthest from its nearest neighbour, as published;
            or "attention", the one with the highest attention (ours).
        objective: Distance to the chosen ones that is maximised: the "min" of them, as published,
            or their "sum" (ours).
        compat: "official" may choose the same patch again where features are duplicates, and takes
            a share as `round(share * N)`.

    Raises:
        ZooError: If an argument is out of range.

    References:
        Alvar et al., CVPR 2025, arXiv 2503.02175; official code github.com/vbdi/divprune
        (CC-BY-NC 4.0; this implementation is written from a specification, not from that code).
    """

    card = Card(
        title="DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models",
        authors="Alvar et al.",
        venue="CVPR",
        year=2025,
        arxiv="2503.02175",
        code="https://github.com/vbdi/divprune",
        licence="CC-BY-NC 4.0",
        kind="diversity",
        training="none",
    )
    projected = True

    def __init__(
        self, start: str = "isolated", objective: str = "min", compat: Compat | None = None
    ) -> None:
        super().__init__(compat)
        self.start = one_of("start", start, STARTS)
        self.objective = one_of("objective", objective, OBJECTIVES)
        # The attention is asked for only where it is read.
        self.reads = ("attention",) if start == "attention" else ()

    def count(self, n: int, share: float) -> int:
        """See `Selector`."""
        return max(1, round(share * n)) if self.official else super().count(n, share)

    def pick(self, given: Given, keep: int | None) -> Selection:
        """See `Selector`."""
        k = whole_number(keep, "divprune")
        distance = 1 - similarity(given.x)
        if self.start == "attention":
            start = given.attention("divprune").argmax(1)
        else:
            start = kth_smallest(distance, 2).argmax(1)
            if not self.official:
                own = torch.eye(given.n, dtype=torch.bool, device=distance.device)
                start = distance.masked_fill(own, torch.inf).amin(1).argmax(1)
        again = self.official
        order = spread_from(distance, start.unsqueeze(1), k, again, self.objective)
        return choose(given, order)
