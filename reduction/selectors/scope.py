"""SCOPE: patches that are looked at, and that cover what is not covered yet."""

from __future__ import annotations

import torch

from reduction.base import Card
from reduction.checks import number, one_of
from reduction.selection.base import Compat, Selection, Selector, choose, whole_number
from reduction.selection.given import Given
from reduction.selection.ranking import similarity
from reduction.selection.registry import register_selector

COMBINE = ("product", "add")


@register_selector("scope")
class Scope(Selector):
    """Greedy: each step takes the patch with the largest gain in coverage times saliency.

    Without any attention the saliency is 1, which is pure coverage (facility location).

    Args:
        alpha: Exponent of the saliency.
        combine: "product" of gain and saliency, or "add".
        compat: Makes no difference here.

    Raises:
        ZooError: If an argument is out of range.

    References:
        Deng et al., NeurIPS 2025, arXiv 2510.24214; official code github.com/kinredon/SCOPE (no
        licence at its root).
    """

    card = Card(
        title="SCOPE: Saliency-Coverage Oriented Token Pruning for Efficient Multimodal LLMs",
        authors="Deng et al.",
        venue="NeurIPS",
        year=2025,
        arxiv="2510.24214",
        code="https://github.com/kinredon/SCOPE",
        licence="none",
        kind="attention + coverage",
        training="none",
    )
    reads = ("attention",)
    optional = True

    def __init__(
        self, alpha: float = 1.0, combine: str = "product", compat: Compat | None = None
    ) -> None:
        super().__init__(compat)
        self.alpha = number("alpha", alpha, least=0)
        self.combine = one_of("combine", combine, COMBINE)

    def pick(self, given: Given, keep: int | None) -> Selection:
        """See `Selector`."""
        k = whole_number(keep, "scope")
        s = similarity(given.x)
        seen = given.has("cls_row") or given.has("column")
        weight = given.attention("scope", total=True) if seen else torch.ones_like(given.x[..., 0])
        weight = weight**self.alpha
        covered = torch.zeros_like(weight)  # a negative similarity covers nothing
        open_ = torch.zeros_like(weight)
        order = []
        for _ in range(k):
            gain = (s - covered.unsqueeze(2)).clamp_min(0).sum(1)
            score = gain * weight if self.combine == "product" else gain + weight
            best = (score + open_).argmax(1, keepdim=True)
            open_ = open_.scatter(1, best, -torch.inf)
            row = s.gather(2, best.unsqueeze(1).expand(-1, given.n, 1)).squeeze(2)
            covered = torch.maximum(covered, row)
            order.append(best)
        return choose(given, torch.cat(order, 1))
