"""HoloV: the most attended patches of every stretch of the image, by its share of attention."""

from __future__ import annotations

import torch
from torch import Tensor

from reduction.base import Card
from reduction.checks import count, number
from reduction.selection.base import Compat, Selection, Selector, answer, choose, whole_number
from reduction.selection.given import Given
from reduction.selection.ranking import first, places, ranks
from reduction.selection.registry import register_selector
from reduction.tokens import take_rows

_EPS = 1e-6


@register_selector("holov")
class HoloV(Selector):
    """A budget for every segment, in proportion to its attention; within it attention ranks.

    Segments are runs of the row-major sequence. The published diversity term cannot act, see the
    page, and is left out.

    Args:
        segments: Number of segments.
        beta: Weight of the diversity term; read by `compat="official"` alone, without effect there.
        compat: "official" leaves zero vectors where a segment has fewer patches than its budget.

    Raises:
        ZooError: If an argument is out of range.

    References:
        Zou et al., NeurIPS 2025, arXiv 2510.02912; official code github.com/obananas/HoloV
        (Apache-2.0).
    """

    card = Card(
        title='Don\'t Just Chase "Highlighted Tokens" in MLLMs: Revisiting Visual Holistic Context '
        "Retention",
        authors="Zou et al.",
        venue="NeurIPS",
        year=2025,
        arxiv="2510.02912",
        code="https://github.com/obananas/HoloV",
        licence="Apache-2.0",
        kind="attention",
        training="none",
        note="Its diversity term is inert: it is Top-K with a budget for every segment.",
    )
    reads = ("attention",)
    projected = True

    def __init__(
        self, segments: int = 16, beta: float = 0.09, compat: Compat | None = None
    ) -> None:
        super().__init__(compat)
        self.segments = count("segments", segments)
        self.beta = number("beta", beta, least=0)

    def pick(self, given: Given, keep: int | None) -> Selection:
        """See `Selector`."""
        k = whole_number(keep, "holov")
        a = given.attention("holov")
        parts = min(self.segments, given.n)
        sizes = [given.n // parts + (p < given.n % parts) for p in range(parts)]
        each = self._scores(given, a, sizes) if self.official else _means(a, sizes)
        share = each / (each.sum(1, keepdim=True) + _EPS)
        if not self.official:
            share = torch.where(
                each.sum(1, keepdim=True) > 0, share, torch.ones_like(share) / parts
            )
        budget = (share * k).floor()
        budget = budget + (ranks(share) < k - budget.sum(1, keepdim=True)).to(budget.dtype)
        size = torch.tensor(sizes, device=a.device)
        part = torch.repeat_interleave(
            torch.arange(parts, device=a.device), size, output_size=given.n
        )
        place = places(a, part, parts)
        mine = budget[:, part]
        kept = place < mine
        if not self.official:
            return choose(given, first(kept, a, k))
        # A segment that is kept whole stays in its natural order.
        begin = size.cumsum(0) - size
        natural = torch.arange(given.n, device=a.device) - begin[part]
        place = torch.where(mine >= size[part], natural, place)
        line = torch.where(kept, begin[part] + place, given.n + natural)
        order = line.argsort(dim=1)[:, :k]
        lives = kept.gather(1, order)
        rows = take_rows(given.features, order) * lives.unsqueeze(2).to(given.features.dtype)
        index = torch.where(lives, order, -1)
        return answer(rows, index, index, given.n)

    def _scores(self, given: Given, a: Tensor, sizes: list[int]) -> Tensor:
        """The official score of every segment, diversity included, `(B, segments)`."""
        found, begin = [], 0
        for size in sizes:
            own, x = a[:, begin : begin + size], given.x[:, begin : begin + size]
            begin += size
            if size == 1:
                found.append(own.mean(1))  # officially without the factor: it gets nothing
                continue
            u = x / (torch.linalg.vector_norm(x, dim=-1, keepdim=True) + _EPS)
            s = u @ u.transpose(1, 2)
            s = s * (1 - torch.eye(size, dtype=s.dtype, device=s.device))
            mean = s.sum(2, keepdim=True) / (size - 1)
            spread = (s - mean).square().sum(2) / (size - 1)
            own = own * 1000
            scale = own.mean(1, keepdim=True) / (spread.mean(1, keepdim=True) + _EPS)
            found.append((own + self.beta * spread * scale).mean(1))
        return torch.stack(found, 1)


def _means(a: Tensor, sizes: list[int]) -> Tensor:
    parts = torch.split(a, sizes, dim=1)
    return torch.stack([part.mean(1) * 1000 for part in parts], 1)
