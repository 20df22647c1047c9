"""PruMerge and PruMerge+: outliers of the class token's attention, with their neighbours merged."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from reduction.base import Card
from reduction.checks import boolean, count, one_of
from reduction.errors import ZooError
from reduction.functional.matching import unit
from reduction.selection.base import Compat, Selection, Selector, answer
from reduction.selection.given import Given
from reduction.selection.ranking import marked, ranks, slots, top, where
from reduction.selection.registry import register_selector
from reduction.tokens import take_rows

WEIGHTS = ("raw", "normalised")


@register_selector("prumerge")
class PruMerge(Selector):
    """The most attended patches, each with the patches whose keys are most like its own added.

    Attention and keys are those of the block behind the features, taken as one head of full width.

    Args:
        adaptive: Keep as many as stand out of an image's attention (quartiles of its values), at
            most K; the rest of the rows is padding. Without, K tokens.
        neighbours: Patches merged into each kept one.
        weights: "raw" attention, as published, which moves a token by a tenth of its length; or
            "normalised": a mean weighted by attention.
        extras: Also hand on one token that sums up all others; it has no place on the image, comes
            last and counts among the K.
        compat: "official": adaptive over the whole batch where `adaptive`, the sum token included,
            tokens in the order of attention.

    Raises:
        ZooError: If an argument is out of range.

    References:
        Shang et al., ICCV 2025, arXiv 2403.15388; official code github.com/42Shawn/LLaVA-PruMerge
        (Apache-2.0).
    """

    card = Card(
        title="LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models",
        authors="Shang et al.",
        venue="ICCV",
        year=2025,
        arxiv="2403.15388",
        code="https://github.com/42Shawn/LLaVA-PruMerge",
        licence="Apache-2.0",
        kind="attention + merge",
        training="none",
    )
    from_last = True
    _plus = False

    def __init__(
        self,
        adaptive: bool = False,
        neighbours: int = 32,
        weights: str = "raw",
        extras: bool = False,
        compat: Compat | None = None,
    ) -> None:
        super().__init__(compat)
        # Under another name: `adaptive` of all selectors is a property.
        self.chooses = boolean("adaptive", adaptive)
        self.neighbours = count("neighbours", neighbours)
        self.weights = one_of("weights", weights, WEIGHTS)
        self.extras = boolean("extras", extras)

    @property
    def adaptive(self) -> bool:
        """See `Selector`."""
        return self.chooses

    @property
    def extra_rows(self) -> int:
        """See `Selector`."""
        return int(self.extras or self.official)

    def pick(self, given: Given, keep: int | None) -> Selection:
        """See `Selector`."""
        a = self._attention(given)
        order, valid = self._official(a, keep) if self.official else self._chosen(a, keep)
        rows = order.shape[1]
        lives = torch.arange(rows, device=a.device) < valid.unsqueeze(1)
        index = torch.where(lives, order, -1)
        exact = given.features.to(given.x.dtype)
        kept = slots(index, given.n) >= 0
        y = self._merged(given, exact, a, order)
        if not self.official:
            # Ascending, padding last.
            place = torch.where(lives, order, given.n).argsort(dim=1)
            index, y, lives = index.gather(1, place), take_rows(y, place), lives.gather(1, place)
        y = y * lives.unsqueeze(2).to(y.dtype)
        slot = slots(index, given.n)
        if self.extra_rows:
            rest = torch.where(kept, 0, a)
            z = rest.unsqueeze(1) @ exact
            if self.weights == "normalised":
                z = z / rest.sum(1).clamp_min(torch.finfo(z.dtype).tiny).view(-1, 1, 1)
            y, index = _put(y, z, valid), torch.nn.functional.pad(index, (0, 1), value=-1)
            slot = torch.where(slot < 0, valid.unsqueeze(1), slot)
            valid = valid + 1
        return answer(y.to(given.features.dtype), index, order, given.n, slot, valid)

    def _attention(self, given: Given) -> Tensor:
        """What the class token of the next block pays, `(B, N)`; without it what is received."""
        if not given.has("q") and not self.official:
            return given.attention(self.name)
        q, k = (_side_by_side(given.need(s, self.name)) for s in ("q", "k"))
        row = (q[:, :1] @ k.transpose(1, 2)).squeeze(1) / math.sqrt(k.shape[2])
        row = row.softmax(-1)
        return given.grouped(row[:, row.shape[1] - given.n * given.group :])

    def _merged(self, given: Given, exact: Tensor, a: Tensor, order: Tensor) -> Tensor:
        """The kept tokens with their neighbours, `(B, t, C)`."""
        key = unit(given.keys(self.name).flatten(2))
        like = take_rows(key, order) @ key.transpose(1, 2)
        like = like.scatter(2, order.unsqueeze(2), -torch.inf)
        count = min(self.neighbours, given.n - 1)
        best = top(like.flatten(0, 1), count)
        near = marked(best, given.n).view_as(like).to(exact.dtype)
        weight = near * a.unsqueeze(1)
        y = take_rows(exact, order)
        if self.weights == "raw":
            return y + weight @ exact
        own = a.gather(1, order).unsqueeze(2)
        total = (own + weight.sum(2, keepdim=True)).clamp_min(torch.finfo(y.dtype).tiny)
        return (own * y + weight @ exact) / total

    def _chosen(self, a: Tensor, keep: int | None) -> tuple[Tensor, Tensor]:
        """Kept patches by attention, then samples `(B, t)`, and how many of them are valid."""
        images, n = a.shape
        limit = n if keep is None else keep - self.extra_rows
        if limit < 1:
            raise ZooError(f"{self.name}: keep={keep} leaves no patch beside the sum token")
        full = a.new_full((images,), limit, dtype=torch.int64)
        if not self.adaptive:
            t = max(1, round(limit / 4)) if self._plus else limit
            chosen = top(a, t)
            if t == limit:
                return chosen, full
            rest = where(~marked(chosen, n), n - t)
            more = limit - t
            return torch.cat([chosen, rest[:, [j * (n - t) // more for j in range(more)]]], 1), full
        outliers = (a > _fence(a, 1)).sum(1).clamp_min(1)
        place = ranks(a)
        best = place < outliers.unsqueeze(1)
        extra = torch.zeros_like(best)
        if self._plus:
            step = (torch.div(n, outliers, rounding_mode="floor") // 3).clamp_min(1)
            at = torch.arange(n, device=a.device)
            extra = (at % step.unsqueeze(1) == 0) & (at < n - 1) & ~best
        at = torch.arange(n, device=a.device)
        line = torch.where(best, place, torch.where(extra, n, 2 * n) + at)
        order = line.argsort(dim=1)
        found = (best | extra).sum(1).clamp_max(limit)
        rows = int(found.max()) if keep is None else limit
        return order[:, :rows], found

    def _official(self, a: Tensor, keep: int | None) -> tuple[Tensor, Tensor]:
        """As published: one number for the batch, from the values of all its images."""
        images, n = a.shape
        if self.adaptive:
            if keep is not None:
                raise ZooError(f"{self.name}: the official code decides itself; give keep=None")
            share = float((a > _fence(a.flatten().unsqueeze(0), 1)).float().mean())
            t = int(n * share)
        elif keep is None or self._plus:
            raise ZooError(f"{self.name}: the official code is offered with adaptive=true alone")
        else:
            t, share = keep - 1, 0.0
        chosen = top(a, t)
        if self._plus:
            if images > 1:
                raise ZooError("prumerge_plus: the official code takes one image at a time")
            step = int(int(1 / share) / 3) if share else 0
            if step < 1:
                raise ZooError(
                    f"prumerge_plus: the official code fails where {share:.3f} of the patches "
                    "stand out; leave compat out"
                )
            taken = set(chosen[0].tolist())
            samples = [i for i in range(0, n - 1, step) if i not in taken]
            more = torch.tensor([samples], dtype=torch.int64, device=a.device)
            chosen = torch.cat([chosen, more], 1)
        return chosen, chosen.new_full((images,), chosen.shape[1])


@register_selector("prumerge_plus")
class PruMergePlus(PruMerge):
    """PruMerge with samples from the whole image beside the patches that stand out.

    A quarter of K is chosen by attention and the rest evenly among the other patches; adaptive, as
    many samples as the density of the outliers says.

    Args:
        adaptive: See `PruMerge`, as for the others.
        neighbours: Patches merged into each kept one.
        weights: "raw" or "normalised".
        extras: Also hand on one token that sums up all others.
        compat: "official" with `adaptive=True`, one image at a time.

    Raises:
        ZooError: If an argument is out of range.

    References:
        Shang et al., ICCV 2025, arXiv 2403.15388; official code github.com/42Shawn/LLaVA-PruMerge
        (Apache-2.0).
    """

    _plus = True


def _fence(a: Tensor, dim: int) -> Tensor:
    """Upper fence of the values: third quartile and one and a half times their distance."""
    ordered = a.sort(dim=dim).values
    low, high = (_percentile(ordered, p) for p in (0.25, 0.75))
    return high + 1.5 * (high - low)


def _percentile(ordered: Tensor, p: float) -> Tensor:
    at = p * (ordered.shape[1] - 1)
    below = ordered[:, math.floor(at)]
    above = ordered[:, math.ceil(at)]
    return (below + (above - below) * (at - math.floor(at))).unsqueeze(1)


def _side_by_side(x: Tensor) -> Tensor:
    """`(B, H, N, d)` as `(B, N, H * d)`."""
    return x if x.dim() == 3 else x.transpose(1, 2).flatten(2)


def _put(y: Tensor, z: Tensor, row: Tensor) -> Tensor:
    """Rows `y` `(B, t, C)` with `z` `(B, 1, C)` at `row` `(B,)`, behind the valid ones."""
    y = torch.nn.functional.pad(y, (0, 0, 0, 1))
    here = torch.arange(y.shape[1], device=y.device) == row.unsqueeze(1)
    return torch.where(here.unsqueeze(2), z, y)
