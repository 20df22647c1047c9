"""VisPruner: important patches, and others from which duplicates were removed."""

from __future__ import annotations

import torch
from torch import Tensor

from reduction.base import Card
from reduction.checks import count, one_of, share
from reduction.errors import ZooError
from reduction.selection.base import Compat, Selection, Selector, choose, whole_number
from reduction.selection.given import Given
from reduction.selection.ranking import similarity, spread_from, top
from reduction.selection.registry import register_selector

DIVERSE = ("rounds", "maxmin")


@register_selector("vispruner")
class VisPruner(Selector):
    """The most attended patches; the others lose duplicates, a few in every round.

    In a round every second one of the remaining patches is compared with those between, and the
    most similar go. What is left depends on the last bits of the features: see the page.

    Args:
        important: Share of K that the attention decides on.
        per_round: Patches that go in a round.
        diverse: "rounds", as published; or "maxmin": the patches farthest from the chosen ones,
            the same intent by a stable rule (ours).
        compat: "official" refuses what makes the official code crash.

    Raises:
        ZooError: If an argument is out of range.

    References:
        Zhang et al., ICCV 2025, arXiv 2412.01818; official code github.com/Theia-4869/VisPruner
        (Apache-2.0).
    """

    card = Card(
        title="Beyond Text-Visual Attention: Exploiting Visual Cues for Effective Token Pruning in "
        "VLMs",
        authors="Zhang et al.",
        venue="ICCV",
        year=2025,
        arxiv="2412.01818",
        code="https://github.com/Theia-4869/VisPruner",
        licence="Apache-2.0",
        kind="attention + diversity",
        training="none",
        note="Chaotic: rounding decides on a third of the diverse tokens; diverse=maxmin is not.",
    )
    reads = ("attention",)

    def __init__(
        self,
        important: float = 0.5,
        per_round: int = 8,
        diverse: str = "rounds",
        compat: Compat | None = None,
    ) -> None:
        super().__init__(compat)
        self.important = share("important", important)
        self.per_round = count("per_round", per_round)
        self.diverse = one_of("diverse", diverse, DIVERSE)

    def pick(self, given: Given, keep: int | None) -> Selection:
        """See `Selector`."""
        k = whole_number(keep, "vispruner")
        order = top(given.attention("vispruner"), given.n)
        important = int(k * self.important)
        if important == k:
            return choose(given, order[:, :k])
        s = similarity(given.x)
        if self.diverse == "maxmin":
            start = order[:, : max(important, 1)]
            return choose(given, spread_from(1 - s, start, k))
        rest = self._rounds(s, order[:, important:], k - important)
        return choose(given, torch.cat([order[:, :important], rest], 1))

    def _rounds(self, s: Tensor, rest: Tensor, wanted: int) -> Tensor:
        """Take duplicates out of `rest` `(B, R)` until `wanted` are left."""
        n = s.shape[2]
        while rest.shape[1] > wanted:
            even, odd = rest[:, ::2], rest[:, 1::2]
            out = min(self.per_round, rest.shape[1] - wanted)
            if self.official and (rest.shape[1] % 2 or out > even.shape[1]):
                raise ZooError(
                    f"vispruner: the official code cannot halve {rest.shape[1]} tokens, or remove "
                    f"{out} of {even.shape[1]}; leave compat out"
                )
            out = min(out, even.shape[1])
            like = s.gather(1, even.unsqueeze(2).expand(-1, -1, n))
            like = like.gather(2, odd.unsqueeze(1).expand(-1, even.shape[1], -1)).amax(2)
            # The survivors come back sorted, so the next round pairs others.
            rest = torch.cat([even.gather(1, top(like, like.shape[1])[:, out:]), odd], 1)
        return rest
