"""Determinantal point process: the patches that span the largest volume (CDPruner without text)."""

from __future__ import annotations

import torch
from torch import Tensor

from reduction.base import Card
from reduction.checks import one_of
from reduction.selection.base import Compat, Selection, Selector, choose, whole_number
from reduction.selection.given import Given
from reduction.selection.ranking import similarity
from reduction.selection.registry import register_selector

QUALITY = ("one", "attention")
_LEAST = 1e-6


@register_selector("dpp")
class DPP(Selector):
    """Greedy search for the subset with the largest determinant of a similarity kernel.

    The kernel is q_i cos(x_i, x_j) q_j. CDPruner takes q from a text; give it as `quality` (B, N),
    or go without a text.

    Args:
        quality_from: q where no `quality` is given: "one" (features alone), or "attention" scaled
            to [0, 1] over the patches of an image.
        compat: "official" repeats a patch once the features' rank is used up.

    Raises:
        ZooError: If an argument is out of range.

    References:
        Zhang et al. (CDPruner), NeurIPS 2025, arXiv 2506.10967; official code
        github.com/Theia-4869/CDPruner (Apache-2.0). The forms without text are ours.
    """

    card = Card(
        title="Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning "
        "in MLLMs",
        authors="Zhang et al.",
        venue="NeurIPS",
        year=2025,
        arxiv="2506.10967",
        code="https://github.com/Theia-4869/CDPruner",
        licence="Apache-2.0",
        kind="diversity",
        training="none",
        note="CDPruner's greedy search without its text.",
    )
    projected = True

    def __init__(self, quality_from: str = "one", compat: Compat | None = None) -> None:
        super().__init__(compat)
        self.quality_from = one_of("quality_from", quality_from, QUALITY)
        self.reads = ("attention",) if quality_from == "attention" else ()

    def pick(self, given: Given, keep: int | None) -> Selection:
        """See `Selector`."""
        k = whole_number(keep, "dpp")
        q = self._quality(given)
        kernel = q.unsqueeze(2) * similarity(given.x) * q.unsqueeze(1)
        left = kernel.diagonal(dim1=1, dim2=2).clone()
        start = None
        if not self.official:
            # Exactly, or rounding decides which of equal patches comes first.
            left = torch.where(given.x.square().sum(2) > 0, q.square(), torch.zeros_like(q))
            if not given.has("quality") and (given.has("cls_row") or given.has("column")):
                start = given.attention("dpp").argmax(1, keepdim=True)
        return choose(given, self._greedy(kernel, left, q, k, start))

    def _greedy(
        self, kernel: Tensor, left: Tensor, q: Tensor, k: int, start: Tensor | None
    ) -> Tensor:
        """Maximum a posteriori, one patch at a time, by the rows of a Cholesky factor."""
        images, n = left.shape
        factor = left.new_zeros(images, k, n)
        closed = torch.zeros_like(left)
        order = []
        for t in range(k):
            if self.official:
                best = left.argmax(1, keepdim=True)
                length = left.gather(1, best).sqrt()
            else:
                room = left.clamp_min(0) + closed
                spent = room.amax(1, keepdim=True) < _LEAST
                best = torch.where(spent, q + closed, room).argmax(1, keepdim=True)
                best = start if start is not None and t == 0 else best
                length = left.gather(1, best).clamp_min(_LEAST).sqrt()
            row = kernel.gather(1, best.unsqueeze(2).expand(-1, -1, n)).squeeze(1)
            if t:
                known = factor[:, :t]
                mine = known.gather(2, best.unsqueeze(1).expand(-1, t, 1))
                row = row - (mine * known).sum(1)
            e = row / length
            if not self.official:
                e = torch.where(spent, torch.zeros_like(e), e)
            factor[:, t] = e
            left = left - e.square()
            left = left.scatter(1, best, -torch.inf)
            closed = closed.scatter(1, best, -torch.inf)
            order.append(best)
        return torch.cat(order, 1)

    def _quality(self, given: Given) -> Tensor:
        if given.has("quality"):
            return given.need("quality", "dpp")
        if self.quality_from == "one":
            return torch.ones_like(given.x[..., 0])
        a = given.attention("dpp")
        low, high = a.amin(1, keepdim=True), a.amax(1, keepdim=True)
        return (a - low + _LEAST) / (high - low + _LEAST)
