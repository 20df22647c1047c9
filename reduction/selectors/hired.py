"""HiRED: a budget that the crops of one large image share, and Top-K within each."""

from __future__ import annotations

import torch
from torch import Tensor

from reduction.base import Card
from reduction.checks import listed, share
from reduction.errors import ZooError
from reduction.selection.base import Compat, Selection, Selector, answer, choose, whole_number
from reduction.selection.given import Given
from reduction.selection.ranking import marked, ranks, slots, top
from reduction.selection.registry import register_selector
from reduction.tokens import take_rows


@register_selector("hired")
class HiRED(Selector):
    """Top-K by the class token's attention; several crops share one budget.

    With `crops` the batch holds, image by image, the whole image and then its crops, row by row.
    The whole image gets its share; the crops get the rest in proportion to the patches in them that
    a shallow block of the whole image attends to. Crops with fewer tokens end in padding.

    Args:
        crops: Rows and columns of crops, e.g. [2, 2]; None for images without any.
        alpha: Share of the budget that the whole image gets.
        compat: "official" counts the attended patches in consecutive runs instead of the regions
            that the crops cover, and loses the tokens that rounding down leaves over.

    Raises:
        ZooError: If an argument is out of range.

    References:
        Arif et al., arXiv 2408.10945; official code github.com/hasanar1f/HiRED (MIT).
    """

    card = Card(
        title="HiRED: Attention-Guided Token Dropping for Efficient Inference of High-Resolution "
        "Vision-Language Models",
        authors="Arif et al.",
        venue="arXiv",
        year=2024,
        arxiv="2408.10945",
        code="https://github.com/hasanar1f/HiRED",
        licence="MIT",
        kind="attention",
        training="none",
    )
    reads = ("attention",)

    def __init__(
        self,
        crops: list[int] | None = None,
        alpha: float = 0.5,
        compat: Compat | None = None,
    ) -> None:
        super().__init__(compat)
        self.crops = None if crops is None else listed("crops", crops, "[rows, columns]")
        if self.crops is not None and (len(self.crops) != 2 or min(self.crops) < 1):
            raise ZooError(f"crops must be [rows, columns], got {crops!r}")
        self.alpha = share("alpha", alpha)

    def shallow_block(self, depth: int) -> int | None:
        """See `Selector`."""
        return None if self.crops is None else 0

    def rows(self, n: int, keep: int, grid: tuple[int, int] | None = None) -> int:
        """See `Selector`; with crops, the rows that each is padded to."""
        if self.crops is None:
            return super().rows(n, keep, grid)
        many = self.crops[0] * self.crops[1]
        full, rest = self._parts(n, many, (many + 1) * keep)
        return min(n, max(full, rest))

    def _parts(self, n: int, many: int, total: int) -> tuple[int, int]:
        full = min(int(total * self.alpha), n)
        return full, min(total - full, many * n)

    def pick(self, given: Given, keep: int | None) -> Selection:
        """See `Selector`."""
        k = whole_number(keep, "hired")
        deep = given.attention("hired", total=True)
        if self.crops is None:
            return choose(given, top(deep, k))
        many, n = self.crops[0] * self.crops[1], given.n
        if given.images % (many + 1):
            raise ZooError(
                f"hired: a batch of images with {many} crops each has a multiple of {many + 1} "
                f"entries, got {given.images}"
            )
        ask = (many + 1) * k
        if given.share is not None:
            ask = int((many + 1) * n * given.share)
        full, rest = self._parts(n, many, ask)
        shallow = given.attention("hired", shallow=True, total=True)[:: many + 1]
        hot = marked(top(shallow, int(n * (1 - self.alpha))), n)
        counts = self._shared(given, hot, many, rest)
        whole = torch.full_like(counts[:, :1], full)
        valid = torch.cat([whole, counts], 1).flatten()
        order = top(deep, n)
        rows = min(n, max(full, rest))
        kept = ranks(deep) < valid.unsqueeze(1)
        at = torch.arange(n, device=deep.device)
        index = torch.where(kept, at, n).sort(dim=1).values[:, :rows]
        lives = index < n
        features = take_rows(given.features, index.clamp_max(n - 1))
        features = features * lives.unsqueeze(2).to(features.dtype)
        index = torch.where(lives, index, -1)
        return answer(features, index, order, n, slots(index, n), valid)

    def _shared(self, given: Given, hot: Tensor, many: int, rest: int) -> Tensor:
        """Tokens of every crop, `(images, many)`."""
        n = given.n
        assert self.crops is not None
        if self.official:
            # Runs of the sequence; what is left over belongs to the last.
            part = (torch.arange(n, device=hot.device) // max(n // many, 1)).clamp_max(many - 1)
        else:
            rows, columns = given.raster("hired")
            down = torch.arange(rows, device=hot.device) * self.crops[0] // rows
            across = torch.arange(columns, device=hot.device) * self.crops[1] // columns
            part = (down.unsqueeze(1) * self.crops[1] + across).flatten()
        groups = torch.arange(many, device=hot.device)
        found = (hot.unsqueeze(1) & (part == groups.unsqueeze(1))).sum(2)
        total = found.sum(1, keepdim=True)
        each = torch.where(total > 0, found / total.clamp_min(1), 1 / many) * rest
        if self.official:
            return each.to(torch.int64).clamp_max(n)
        # The r-th token of a crop is worth its quota less r: the best `rest` of all are Hamilton's
        # apportionment, and what a full crop cannot take goes on to the others.
        worth = (each.double().unsqueeze(2) - torch.arange(n, device=hot.device)).flatten(1)
        served = marked(top(worth, rest), worth.shape[1])
        return served.view(-1, many, n).sum(2)
