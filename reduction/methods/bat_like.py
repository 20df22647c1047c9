"""BAT-like: cluster what gets no attention, pair up what does. Built from a description."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from reduction.assignment import Merge
from reduction.base import Card, Reducer
from reduction.counts import Dims, Step
from reduction.errors import ZooError
from reduction.functional.clustering import mean_shares
from reduction.functional.density import density_peaks
from reduction.functional.matching import bipartite_matching, split_sizes
from reduction.mixins.ranking import attention_score, score_signal
from reduction.registry import register
from reduction.tokens import Signals, Tokens, take_rows


@register("bat_like")
class BatLike(Reducer):
    """Keep attentive tokens and merge twins among them; cluster the others. From a description.

    Between attention and MLP, patches are split by the class token's attention. Of the attentive
    ones the most similar pairs merge; the inattentive ones are clustered around density peaks.
    A group becomes the mean of its members weighted by their attention. So the result holds both
    what matters and a sample of everything else.

    The abstract and a figure of "Beyond Attentive Tokens" (BAT) say that much. How many clusters
    and pairs it uses at each keep rate is not published and does not follow from its logs. The
    counts, the density's formula and the weights are ours: results are not BAT's.

    Args:
        attentive_share: Share of the kept tokens that come from the attentive ones, before twins
            merge (ours). At least one token always stands for the inattentive ones.
        pair_share: Twins that merge, as a share of the attentive tokens, at most half (ours). Each
            leaves room for one more cluster.
        neighbors: Neighbours that the density looks at (ours).
        score_from: "class" (the paper's) or "column_mean" (attention received from all tokens;
            ours, for models without a class token).

    Raises:
        ZooError: If an argument is out of range.

    References:
        After Long et al., CVPR 2023, arXiv 2211.11315, whose code was not released.
    """

    card = Card(
        title="Beyond Attentive Tokens: Incorporating Token Importance and Diversity for "
        "Efficient Vision Transformers",
        authors="Long et al.",
        venue="CVPR",
        year=2023,
        arxiv="2211.11315",
        code=None,
        licence=None,
        kind="merge + cluster",
        training="none; the paper fine-tunes",
        note="Built from a description of BAT, whose code is not public; counts are ours, and it "
        "is compared with no reference.",
    )
    site = "mid"

    def __init__(
        self,
        attentive_share: float = 0.7,
        pair_share: float = 0.2,
        neighbors: int = 5,
        score_from: str = "class",
    ) -> None:
        super().__init__()
        for name, value, top in (
            ("attentive_share", attentive_share, 1.0),
            ("pair_share", pair_share, 0.5),
        ):
            if isinstance(value, bool) or not 0 <= value <= top:
                raise ZooError(f"{name} must be in [0, {top:g}], got {value!r}")
        if isinstance(neighbors, bool) or neighbors < 1:
            raise ZooError(f"neighbors must be 1 or more, got {neighbors!r}")
        self.attentive_share = attentive_share
        self.pair_share = pair_share
        self.neighbors = neighbors
        self.score_from = score_from
        self.needs = score_signal(score_from)

    def split(self, n: int, keep: int) -> tuple[int, int, int]:
        """Attentive tokens, pairs that merge among them, and clusters of the others.

        Args:
            n: Tokens entering.
            keep: Tokens leaving: attentive - pairs + clusters.
        """
        attentive = min(math.ceil(self.attentive_share * keep), keep - 1)
        pairs = min(int(self.pair_share * attentive), n - keep)
        return attentive, pairs, keep - attentive + pairs

    def assign(self, t: Tokens, s: Signals, step: Step) -> Merge:
        score = attention_score(s, self.score_from, t.prefix)
        # A tracer would make a tensor of the count.
        attentive, pairs, clusters = self.split(int(t.n), int(step.keep))
        order = score.detach().argsort(dim=1, descending=True)
        slot, leader = self._groups(t.patches.detach(), order, attentive, pairs, clusters)
        weight = score.to(torch.promote_types(score.dtype, torch.float32)).clamp_min(1e-12)
        return Merge(slot, leader, coef=mean_shares(weight, slot, leader.shape[1]))

    @torch.no_grad()
    def _groups(
        self, x: Tensor, order: Tensor, attentive: int, pairs: int, clusters: int
    ) -> tuple[Tensor, Tensor]:
        """Group of each token `(B, N)` and leader of each group `(B, M)`: pairs, then clusters."""
        first, rest = order[:, :attentive], order[:, attentive:]
        peaks, member = density_peaks(take_rows(x, rest), clusters, self.neighbors)
        slots, leaders = [member + (attentive - pairs)], [rest.gather(1, peaks)]
        if attentive:
            match = bipartite_matching(take_rows(x, first), pairs, 0)
            place = torch.arange(match.leader.shape[1], device=x.device).expand_as(match.leader)
            own = torch.zeros_like(first).scatter(1, match.leader, place)
            slots.insert(0, own.scatter(1, match.source, match.target))
            leaders.insert(0, first.gather(1, match.leader))
        slot = torch.zeros_like(order).scatter(1, order, torch.cat(slots, 1))
        return slot, torch.cat(leaders, 1)

    def macs(self, n: int, prefix: int, step: Step, dims: Dims) -> int:
        attentive, pairs, _ = self.split(n, step.keep)
        senders, receivers = split_sizes(attentive, 0) if pairs else (0, 0)
        return ((n - attentive) ** 2 + senders * receivers) * dims.width
