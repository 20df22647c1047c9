"""DART's pivot rule on the tower's own keys: patches least like a few pivots."""

from __future__ import annotations

import torch

from reduction.base import Card
from reduction.checks import count
from reduction.selection.base import Compat, Selection, Selector, choose, whole_number
from reduction.selection.given import Given
from reduction.selection.ranking import similarity, top
from reduction.selection.registry import register_selector


@register_selector("dart")
class DartPivots(Selector):
    """Pivots are the patches with the longest keys; each takes the patches least like it.

    The vision half of the method; DART itself also has pivots among a language model's text.

    Args:
        pivots: How many.
        compat: "official" answers with `pivots + pivots * (K // pivots)` tokens, more than asked.

    Raises:
        ZooError: If an argument is out of range.

    References:
        Wen et al., arXiv 2502.11494; official code of the rule: github.com/ModelTC/LightCompress
        (Apache-2.0).
    """

    card = Card(
        title="Stop Looking for Important Tokens in Multimodal Language Models: Duplication "
        "Matters More",
        authors="Wen et al.",
        venue="arXiv",
        year=2025,
        arxiv="2502.11494",
        code="https://github.com/ModelTC/LightCompress",
        licence="Apache-2.0",
        kind="diversity",
        training="none",
        note="The vision half of DART alone, which is not the published method.",
    )
    reads = ("k",)

    def __init__(self, pivots: int = 4, compat: Compat | None = None) -> None:
        super().__init__(compat)
        self.pivots = count("pivots", pivots)

    def rows(self, n: int, keep: int, grid: tuple[int, int] | None = None) -> int:
        """See `Selector`."""
        if not self.official:
            return super().rows(n, keep, grid)
        return min(n, self.pivots + self.pivots * (keep // self.pivots))

    def pick(self, given: Given, keep: int | None) -> Selection:
        """See `Selector`."""
        k = whole_number(keep, "dart")
        pivots = min(self.pivots, given.n if self.official else k)
        total = self.rows(given.n, k)
        each, more = divmod(total - pivots, pivots)
        pivot = top(given.keys("dart").abs().sum((2, 3)), pivots)
        like = similarity(given.x).gather(1, pivot.unsqueeze(2).expand(-1, -1, given.n))
        taken = torch.zeros_like(like[:, 0]).scatter(1, pivot, torch.inf)
        order = [pivot]
        for p in range(pivots):
            least = top(-like[:, p] - taken, each + (p < more))
            taken = taken.scatter(1, least, torch.inf)
            order.append(least)
        return choose(given, torch.cat(order, 1))
