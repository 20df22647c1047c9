"""PruneSID: principal directions group the patches; within a group near duplicates go last."""

from __future__ import annotations

import torch
from torch import Tensor

from reduction.base import Card
from reduction.checks import boolean
from reduction.eager import traced
from reduction.errors import ZooError
from reduction.selection.base import Compat, Selection, Selector, answer, whole_number
from reduction.selection.given import Given
from reduction.selection.ranking import first, similarity, top
from reduction.selection.registry import register_selector
from reduction.tokens import take_rows


@register_selector("prunesid")
class PruneSID(Selector):
    """A quarter of K groups; each keeps its most attended patches that are not alike.

    Officially the principal directions are those of a randomised algorithm; here they are exact.
    Groups may be given as the signal `groups` (B, N).

    Args:
        class_token: Also hand on the class token, as the first row; it counts among the K.
        compat: "official": class token first, then group by group.

    Raises:
        ZooError: If an argument is out of range.

    References:
        Fang et al., ICLR 2026, arXiv 2603.09480; official code github.com/ZhengyaoFang/PruneSID
        (Apache-2.0 by its README, no licence file).
    """

    card = Card(
        title="Prune Redundancy, Preserve Essence: Vision Token Compression in VLMs via "
        "Synergistic Importance-Diversity",
        authors="Fang et al.",
        venue="ICLR",
        year=2026,
        arxiv="2603.09480",
        code="https://github.com/ZhengyaoFang/PruneSID",
        licence="Apache-2.0 (README)",
        kind="attention + diversity",
        training="none",
        note="The official groups are random: a third of the tokens differ from run to run.",
    )
    reads = ("attention",)

    def __init__(self, class_token: bool = False, compat: Compat | None = None) -> None:
        super().__init__(compat)
        self.class_token = boolean("class_token", class_token)

    @property
    def extra_rows(self) -> int:
        """See `Selector`."""
        return int(self.class_token or self.official)

    def pick(self, given: Given, keep: int | None) -> Selection:
        """See `Selector`."""
        k = whole_number(keep, "prunesid")
        wanted = k - self.extra_rows
        groups = max(1, min(k // 4, wanted))
        group = given.signals.get("groups")
        if group is None:
            group = components(given.x, groups)
        elif not traced() and not bool(((group >= 0) & (group < groups)).all()):
            raise ZooError(
                f"prunesid: groups must be numbered 0 to {groups - 1} at keep={k}, got "
                f"{int(group.min())} to {int(group.max())}"
            )
        s = given.attention("prunesid", total=True)
        order = self._order(given, group, groups, s, k, wanted)
        if not self.extra_rows:
            index = order.sort(dim=1).values
            return answer(take_rows(given.features, index), index, order, given.n)
        index = order if self.official else order.sort(dim=1).values
        rows = torch.cat([given.class_token("prunesid"), take_rows(given.features, index)], 1)
        index = torch.nn.functional.pad(index, (1, 0), value=-1)
        return answer(rows, index, order, given.n)

    def _order(
        self, given: Given, group: Tensor, groups: int, s: Tensor, k: int, wanted: int
    ) -> Tensor:
        """Kept patches, group by group and by rank within it, `(B, wanted)`."""
        n = given.n
        like = similarity(given.x)
        off = like.sum((1, 2)) - like.diagonal(dim1=1, dim2=2).sum(1)
        limit = (k / 32 * off / (n * (n - 1))).view(-1, 1)
        lives = _suppressed(like, group, s, limit)
        member = torch.nn.functional.one_hot(group, groups)  # (B, N, G)
        size = member.sum(1)
        found = (member * lives.unsqueeze(2)).sum(1)
        budget = _budgets(size, found, k, wanted)
        # Place in the group: survivors by attention, then the others by attention.
        line = first(lives, s, n)
        count = member.gather(1, line.unsqueeze(2).expand_as(member)).cumsum(1)
        place = count.gather(2, group.gather(1, line).unsqueeze(2)).squeeze(2) - 1
        place = torch.zeros_like(place).scatter(1, line, place)
        kept = place < budget.gather(1, group)
        return torch.where(kept, group * n + place, groups * n).argsort(dim=1)[:, :wanted]


def components(x: Tensor, groups: int) -> Tensor:
    """Principal direction that each patch has the largest part of, `(B, N)`.

    Of the patches' sigmoids, less the mean over the channels of each; in float64.

    Args:
        x: `(B, N, C)`.
        groups: Directions.
    """
    a = x.double().sigmoid()
    a = a - a.mean(2, keepdim=True)
    vectors = torch.linalg.eigh(a @ a.transpose(1, 2)).eigenvectors
    part: Tensor = vectors.flip(2)[:, :, :groups].abs().argmax(2)
    return part


def _suppressed(like: Tensor, group: Tensor, s: Tensor, limit: Tensor) -> Tensor:
    """Mask of the patches that no better one of their group resembles by more than `limit`."""
    n = like.shape[1]
    order = top(s, n)
    near = (like > limit.unsqueeze(2)) & (group.unsqueeze(2) == group.unsqueeze(1))
    near = near.gather(1, order.unsqueeze(2).expand_as(near))
    near = near.gather(2, order.unsqueeze(1).expand_as(near)).triu(1)
    lives = torch.ones_like(near[:, 0])
    for i in range(n - 1):
        lives = lives & ~(near[:, i] & lives[:, i : i + 1])
    return torch.zeros_like(lives).scatter(1, order, lives)


def _budgets(size: Tensor, found: Tensor, k: int, wanted: int) -> Tensor:
    """Patches of every group, `(B, G)`, that add up to `wanted`."""
    low = size.clamp_max(1)
    high = torch.minimum(size.clamp_max(5 * -(-k // 64)), found)
    # Raise all limits by the same until K would fit.
    steps = torch.arange(int(k) + 1, device=size.device)
    raised = torch.minimum(high.unsqueeze(2) + steps, size.unsqueeze(2))
    step = (raised.sum(1) < k).sum(1)
    high = torch.minimum(high + step.unsqueeze(1), size)
    other = wanted - low.sum(1, keepdim=True)
    share = found.cumsum(1) / found.sum(1, keepdim=True) * other
    upto = share.round().to(torch.int64)
    t = torch.minimum(upto.diff(dim=1, prepend=torch.zeros_like(upto[:, :1])) + low, high)
    # What the limits cut off goes to the groups with most survivors.
    short = wanted - t.sum(1, keepdim=True)
    order = top(found, found.shape[1])
    room = (high - t).gather(1, order)
    given = (short - (room.cumsum(1) - room)).clamp_min(0)
    return t.scatter_add(1, order, torch.minimum(given, room))
