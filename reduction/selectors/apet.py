"""ApET: patches that a small basis of others explains worst."""

from __future__ import annotations

import torch
from torch import Tensor

from reduction.base import Card
from reduction.checks import count, number
from reduction.errors import ZooError
from reduction.selection.base import Compat, Selection, Selector, answer, whole_number
from reduction.selection.given import Given
from reduction.selection.ranking import farthest, first, marked, nearest, slots, sums, top
from reduction.selection.registry import register_selector
from reduction.tokens import take_rows


@register_selector("apet")
class ApET(Selector):
    """Keep a basis and the patches with the largest error when the basis approximates them.

    The others are averaged into the kept patch most like them, basis patches apart.

    Args:
        basis: Patches of the basis, chosen by farthest point sampling.
        ridge: Added to the diagonal of their Gram matrix.
        compat: "official" keeps none of the basis where it is: its features are put into the
            places of the last kept patches, and its own patches merge into others.

    The first patch of the basis is drawn at random officially; here it is the signal `start` (B,),
    or the patch with the longest features.

    Raises:
        ZooError: If an argument is out of range.

    References:
        Ma et al., CVPR 2026, arXiv 2602.19870; official code github.com/MaQianKun0/ApET (MIT).
    """

    card = Card(
        title="ApET: Approximation-Error Guided Token Compression for Efficient VLMs",
        authors="Ma et al.",
        venue="CVPR",
        year=2026,
        arxiv="2602.19870",
        code="https://github.com/MaQianKun0/ApET",
        licence="MIT",
        kind="reconstruction + merge",
        training="none",
        note="The official start is random, and half of the tokens depend on it.",
    )

    def __init__(self, basis: int = 10, ridge: float = 1e-5, compat: Compat | None = None) -> None:
        super().__init__(compat)
        self.basis = count("basis", basis)
        self.ridge = number("ridge", ridge, least=0)

    def pick(self, given: Given, keep: int | None) -> Selection:
        """See `Selector`."""
        k = whole_number(keep, "apet")
        size = min(self.basis, given.n)
        if self.official and k <= size:
            raise ZooError(f"apet: the official code needs keep > basis={size}, got {k}")
        basis, error = self.errors(given, size)
        exact = given.features.to(given.x.dtype)
        if self.official:
            return self._official(given, exact, basis, top(error, k))
        held = basis[:, : min(size, k // 2)]
        fixed = marked(held, given.n)
        heads = first(~fixed, error, k - held.shape[1])
        order = torch.cat([held, heads], 1)
        index = order.sort(dim=1).values
        own = slots(index, given.n)
        host = nearest(given.x, take_rows(given.x, heads))
        slot = torch.where(own < 0, own.gather(1, heads.gather(1, host)), own)
        added, members = sums(exact, slot, k)
        rows = (added / members).to(given.features.dtype)
        return answer(rows, index, order, given.n, slot)

    def errors(self, given: Given, size: int) -> tuple[Tensor, Tensor]:
        """Basis `(B, b)` in the order of sampling, and the error of every patch, `(B, N)`."""
        x = given.x
        start = (
            given.need("start", "apet")
            if given.has("start")
            else torch.linalg.vector_norm(x, dim=-1).argmax(1)
        )
        basis = farthest(x, start, size)
        rows = take_rows(x, basis).double()
        ridge = self.ridge * torch.eye(size, dtype=rows.dtype, device=x.device)
        # In float64: patches that are alike make the system nearly singular.
        weight = torch.linalg.solve(
            rows @ rows.transpose(1, 2) + ridge, rows @ x.double().transpose(1, 2)
        )
        gap = x.double() - weight.transpose(1, 2) @ rows
        return basis, torch.linalg.vector_norm(gap, dim=-1).to(x.dtype)

    def _official(self, given: Given, exact: Tensor, basis: Tensor, order: Tensor) -> Selection:
        head = order[:, : order.shape[1] - basis.shape[1]]
        tail = order[:, head.shape[1] :].sort(dim=1).values
        kept = slots(torch.cat([head, tail], 1), given.n)
        host = nearest(given.x, take_rows(given.x, head))
        slot = torch.where(kept < 0, host, kept)
        added, members = sums(exact, slot, order.shape[1])
        rows = added / members
        index = torch.cat([head, tail], 1)
        rows = torch.cat([rows[:, : head.shape[1]], take_rows(exact, basis)], 1)
        index, place = index.sort(dim=1)
        rows = take_rows(rows, place).to(given.features.dtype)
        moved = torch.zeros_like(place).scatter(
            1, place, torch.arange(place.shape[1], device=place.device).expand_as(place)
        )
        return answer(rows, index, order, given.n, moved.gather(1, slot))
