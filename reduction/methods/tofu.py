"""ToFu: prune in early blocks, merge in late ones, without shrinking the norm."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from reduction.assignment import Assignment, Keep, Merge, apply
from reduction.base import Card
from reduction.checks import boolean, one_of
from reduction.counts import Dims, Step
from reduction.errors import ZooError
from reduction.functional.joining import Decision
from reduction.functional.matching import (
    Matching,
    bipartite_matching,
    mean_of_members,
    split_sizes,
)
from reduction.functional.settling import plain_mean
from reduction.mixins.pairing import Pairs
from reduction.registry import register
from reduction.tokens import Signals, Tokens

FORMS = ("intended", "port", "mean")
STRATEGIES = ("prune", "merge")


@register("tofu")
class ToFu(Pairs):
    """Token Fusion.

    Between attention and MLP tokens are matched as in ToMe: every other token looks for its most
    similar neighbour by the mean over heads of the keys, and the `r` best pairs are taken. Early
    blocks drop the sources and leave their destinations as they are; later ones merge by MLERP,
    which keeps the length of vectors that a mean would shrink. With `G` a destination and its
    sources,

        y = max_{i in G} |x_i| * mean(G) / |mean(G)|

    Sizes enter neither the mean nor the attention.

    Counts belong to the schedule: `schedule.r=13`, or the share of the sequence with the class
    token that one public port keeps in every block, `schedule=keep_rate schedule.of=current
    schedule.rounding=ceil schedule.blocks=all schedule.prefix=1`.

    Args:
        switch: The last block that prunes; null is half of the depth (the ports' choice, the
            paper's rule was not checked), -1 prunes nowhere. A list says "prune" or "merge" for
            every block.
        mlerp: "intended": as above. "port": the mean times `max |x_i| / |x_t|` with the destination
            `x_t` (both public ports divide by that before averaging, so groups whose destination is
            the longest are plain means). "mean": the plain mean.
        prop_attn: Proportional attention; ours.

    Raises:
        ZooError: If an argument is unknown.

    References:
        Kim et al., WACV 2024, arXiv 2312.01026; no official code. Ports were executed:
        github.com/hchautran/PiToMe and github.com/Westlake-AI/OpenToMe (this implementation is
        written from a specification, not from their code).
    """

    card = Card(
        title="Token Fusion: Bridging the Gap between Token Pruning and Token Merging",
        authors="Kim et al.",
        venue="WACV",
        year=2024,
        arxiv="2312.01026",
        code=None,
        licence=None,
        kind="prune, then merge",
        training="none",
        note="No official code; checked against two public ports, whose MLERP is mlerp=port.",
    )
    site = "mid"
    needs = frozenset({"k"})
    compares = "key"
    family = "constant_r"

    def __init__(
        self,
        switch: int | Sequence[str] | None = None,
        mlerp: str = "intended",
        prop_attn: bool = False,
    ) -> None:
        super().__init__()
        listed = isinstance(switch, Sequence)
        if isinstance(switch, Sequence):
            listed = not isinstance(switch, str) and len(switch) > 0
            listed = listed and all(s in STRATEGIES for s in switch)
            switch = list(switch) if listed else switch
        block = isinstance(switch, int) and not isinstance(switch, bool)
        if not (listed or switch is None or block):
            raise ZooError(
                "switch must be the last block that prunes, null, or a list with 'prune' or "
                f"'merge' for every block, got {switch!r}"
            )
        self.switch = switch
        self.mlerp = one_of("mlerp", mlerp, FORMS)
        self.prop_attn = boolean("prop_attn", prop_attn)

    def max_drop(self, n: int) -> int:
        return n // 2

    def prunes(self, block: int, depth: int) -> bool:
        """Whether a block drops its sources instead of merging them.

        Raises:
            ZooError: If a list has no entry for it.
        """
        if self.switch is None or isinstance(self.switch, int):
            return block <= (depth // 2 if self.switch is None else self.switch)
        if block >= len(self.switch):
            raise ZooError(
                f"switch lists {len(self.switch)} blocks, but block {block} reduces; give one "
                "entry per block"
            )
        return self.switch[block] == "prune"

    def assign(self, t: Tokens, s: Signals, step: Step) -> Assignment:
        """Pairs; the mean of `Merge` has yet to get its length."""
        match = bipartite_matching(self.alike(t, s, step), t.n - step.keep, t.prefix)
        if self.prunes(step.block, step.depth):
            return Keep(match.leader, slot=_slots(match, t.n))
        share = mean_of_members(match.target, step.keep)
        return Merge(None, match.leader, coef=share, pairs=(match.source, match.target))

    def reduce(self, t: Tokens, s: Signals, step: Step) -> Tokens:
        return self._lengthened(t, self.assign(t, s, step))

    def unite(self, t: Tokens, s: Signals, step: Step, d: Decision) -> Tokens:
        a = d.joined(t)
        if self.prunes(step.block, step.depth):
            return apply(t, Keep(a.leader, a.valid, a.slot))
        return self._lengthened(t, plain_mean(a, t.size.dtype))

    def _lengthened(self, t: Tokens, a: Assignment) -> Tokens:
        """Tokens after an assignment, with the length that belongs to a merge."""
        out = apply(t, a)
        if not isinstance(a, Merge) or self.mlerp == "mean":
            return out
        slot, m = a.slot, a.leader.shape[1]
        if slot is None:
            assert a.pairs is not None
            slot = _slots(Matching(a.leader, *a.pairs), t.n)
        bins = torch.where(slot < 0, m, slot)
        dtype = torch.promote_types(t.x.dtype, torch.float32)
        length = torch.linalg.vector_norm(t.patches, dim=-1, dtype=dtype)
        own = length.gather(1, a.leader)
        longest = own.new_zeros(own.shape[0], m + 1).scatter_reduce(1, bins, length, "amax")[:, :m]
        below = own
        if self.mlerp == "intended":
            below = torch.linalg.vector_norm(out.patches, dim=-1, dtype=dtype)
        # A mean of length zero has no direction, and a group of one is its only member.
        members = torch.zeros_like(bins[:, :1]).expand(-1, m + 1)
        alone = members.scatter_add(1, bins, torch.ones_like(bins))[:, :m] == 1
        factor = longest / below.clamp_min(torch.finfo(dtype).tiny)
        factor = torch.where(alone | (below == 0), 1.0, factor).to(t.x.dtype).unsqueeze(-1)
        x = out.patches * factor
        return out._replace(x=torch.cat([out.x[:, : t.prefix], x], dim=1) if t.prefix else x)

    def macs(self, n: int, prefix: int, step: Step, dims: Dims) -> int:
        senders, receivers = split_sizes(n, prefix)
        return senders * receivers * dims.head_dim


def _slots(match: Matching, n: int) -> Tensor:
    """Where each token is represented from now on, `(B, n)`."""
    rows = torch.arange(match.leader.shape[1], device=match.leader.device)
    slot = match.leader.new_empty(match.leader.shape[0], n)
    slot = slot.scatter(1, match.leader, rows.expand_as(match.leader))
    return slot.scatter(1, match.source, match.target)
