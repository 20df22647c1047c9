"""VisionZip: dominant patches, and a few contextual tokens that gather the others."""

from __future__ import annotations

import torch
from torch import Tensor

from reduction.base import Card
from reduction.checks import boolean, count, one_of
from reduction.errors import ZooError
from reduction.selection.base import (
    Compat,
    Selection,
    Selector,
    answer,
    whole_number,
)
from reduction.selection.given import Given
from reduction.selection.ranking import marked, nearest, slots, sums, top, where
from reduction.selection.registry import register_selector
from reduction.tokens import take_rows

CONTEXTUAL = ("sum", "mean")


@register_selector("visionzip")
class VisionZip(Selector):
    """Keep what the class token looks at; the rest joins targets spread evenly among it.

    By default rows are patches in ascending order, each merged token at the place of its target,
    and K counts patches alone: what a serving engine can give positions to.

    Args:
        targets: Contextual tokens K_c; None is 10 of every 64, the paper's share. 0 merges nothing.
        contextual: "sum" adds the mean of the joining patches to the target, as the official code
            does and for all published numbers; such a token is about twice as long as others.
            "mean" is the mean of all members, target included, which the paper's text describes.
        class_token: Also hand on the class token, as the first row; it counts among the K.
        compat: "official": class token first, then dominant patches, then merged tokens.

    Raises:
        ZooError: If an argument is out of range.

    References:
        Yang et al., CVPR 2025, arXiv 2412.04467; official code github.com/dvlab-research/VisionZip
        (Apache-2.0).
    """

    card = Card(
        title="VisionZip: Longer is Better but Not Necessary in Vision Language Models",
        authors="Yang et al.",
        venue="CVPR",
        year=2025,
        arxiv="2412.04467",
        code="https://github.com/dvlab-research/VisionZip",
        licence="Apache-2.0",
        kind="attention + merge",
        training="none",
    )
    reads = ("attention", "k")

    def __init__(
        self,
        targets: int | None = None,
        contextual: str = "sum",
        class_token: bool = False,
        compat: Compat | None = None,
    ) -> None:
        super().__init__(compat)
        self.targets = count("targets", targets, least=0, null=True)
        self.contextual = one_of("contextual", contextual, CONTEXTUAL)
        self.class_token = boolean("class_token", class_token)

    @property
    def extra_rows(self) -> int:
        """See `Selector`."""
        return int(self.class_token or self.official)

    def pick(self, given: Given, keep: int | None) -> Selection:
        """See `Selector`."""
        k = whole_number(keep, "visionzip")
        merged = k * 10 // 64 if self.targets is None else self.targets
        dominant = k - self.extra_rows - merged
        if dominant < 0 or (dominant == 0 and merged == 0):
            raise ZooError(
                f"visionzip: {merged} contextual tokens do not go into keep={k}; lower targets"
            )
        if self.official and merged == 0:
            raise ZooError("visionzip: the official code divides by zero without a target")
        chosen, target, slot = self._split(given, dominant, merged)
        exact = given.features.to(given.x.dtype)
        y = take_rows(exact, target)
        if merged:
            total, members = sums(exact, slot, merged)
            if self.contextual == "sum":
                y = y + total / members.clamp_min(1)
            else:
                y = (y + total) / (members + 1)
        y = y.to(given.features.dtype)
        order = torch.cat([chosen, target], 1)
        if self.official:
            return self._official(given, chosen, y, order, slot)
        index, place = order.sort(dim=1)
        rows = take_rows(torch.cat([take_rows(given.features, chosen), y], 1), place)
        own = slots(index, given.n)
        # A joined patch is in the row of its target.
        host = own.gather(1, target.gather(1, slot.clamp_min(0))) if merged else own
        out = torch.where(slot >= 0, host, own)
        if self.extra_rows:
            rows, index, out = _with_class(given, rows, index, out)
        return answer(rows, index, order, given.n, out)

    def _split(self, given: Given, dominant: int, merged: int) -> tuple[Tensor, Tensor, Tensor]:
        """Dominant patches, targets ascending, and the target that each other patch joins."""
        chosen = top(given.attention("visionzip"), dominant)
        left = given.n - dominant
        rest = where(~marked(chosen, given.n), left)
        step = max(1, left // max(merged, 1))
        target = rest[:, [j * step for j in range(merged)]]
        none = torch.full((given.images, given.n), -1, dtype=torch.int64, device=chosen.device)
        if not merged:
            return chosen, target, none
        key = given.keys("visionzip").mean(2)
        slot = nearest(key, take_rows(key, target))
        taken = marked(torch.cat([chosen, target], 1), given.n)
        return chosen, target, torch.where(taken, none, slot)

    def _official(
        self, given: Given, chosen: Tensor, y: Tensor, order: Tensor, slot: Tensor
    ) -> Selection:
        index = chosen.sort(dim=1).values
        rows = torch.cat([given.class_token("visionzip"), take_rows(given.features, index), y], 1)
        indices = torch.nn.functional.pad(index, (1, 0), value=-1)
        indices = torch.nn.functional.pad(indices, (0, y.shape[1]), value=-1)
        own = slots(indices, given.n)
        first = 1 + chosen.shape[1]
        target = order[:, chosen.shape[1] :]
        rows_of = torch.arange(y.shape[1], device=own.device) + first
        own = own.scatter(1, target, rows_of.expand_as(target))
        own = torch.where(slot >= 0, slot + first, own)
        return answer(rows, indices, order, given.n, own)


def _with_class(
    given: Given, rows: Tensor, index: Tensor, slot: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    rows = torch.cat([given.class_token("visionzip"), rows], 1)
    index = torch.nn.functional.pad(index, (1, 0), value=-1)
    return rows, index, torch.where(slot >= 0, slot + 1, slot)
