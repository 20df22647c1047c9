"""Zero-TPrune: tokens vote for each other through the attention graph. Built from a description."""

from __future__ import annotations

import torch
from torch import Tensor

from reduction.base import Card
from reduction.checks import count, number, one_of, share
from reduction.counts import Dims, Step
from reduction.errors import ZooError
from reduction.functional.clustering import no_autocast
from reduction.functional.matching import most_similar
from reduction.mixins.ranking import ScoreReducer
from reduction.registry import register
from reduction.tokens import Signals, Tokens, take_rows

STARTS = ("class", "uniform")
# Iterations in the first, middle and last third of the blocks.
_ITERATIONS = (30, 5, 1)


@torch.no_grad()
def weighted_pagerank(
    attn: Tensor, start: Tensor, iterations: int, live: Tensor | None = None
) -> Tensor:
    """Importance by votes: attention received, weighted by the importance of the giver.

    Args:
        attn: Attention `(B, H, N, N)`, rows are queries.
        start: First importance `(B, H, N)`.
        iterations: How often everyone votes.
        live: `(B, N)`, one for the tokens that take part and zero for the others: the graph is
            then the submatrix with its rows scaled to one. None: all take part.

    Returns:
        `(B, H, N)` with mean one over the live tokens, zero for the others; in float32 or better.
    """
    attn = attn.to(torch.promote_types(attn.dtype, torch.float32))
    score = start.to(attn.dtype).unsqueeze(2)
    weight = torch.ones_like(score)
    total: Tensor | float = float(attn.shape[-1])
    mask = weight
    with no_autocast(attn):
        if live is not None:
            mask = live.to(attn.dtype)[:, None, None].expand_as(score)
            seen = (attn @ mask.transpose(2, 3)).transpose(2, 3)
            weight = mask / seen.clamp_min(1e-12)
            total = mask.sum(-1, keepdim=True)
            score = score * mask
        for _ in range(iterations):
            score = ((score * weight) @ attn) * mask
            score = score * (total / score.sum(-1, keepdim=True).clamp_min(1e-12))
    return score.squeeze(2)


def informative_mean(
    score: Tensor, live: Tensor, low: float = 0.01, high: float | None = 0.7
) -> Tensor:
    """Join the heads: root mean square over those that neither agree on all nor on one token.

    Args:
        score: `(B, H, N)`, mean one.
        live: `(B, N)`, one or zero: tokens over which the variance is taken.
        low: Least variance of a head that counts.
        high: Largest; None: any.

    Returns:
        `(B, N)`. Where no head counts, all do.
    """
    mask = live.to(score.dtype).unsqueeze(1)
    count = mask.sum(-1, keepdim=True).clamp_min(1)
    centred = (score - (score * mask).sum(-1, keepdim=True) / count) * mask
    variance = centred.square().sum(-1, keepdim=True) / count
    good = variance >= low
    if high is not None:
        good = good & (variance <= high)
    good = (good | ~good.any(1, keepdim=True)).to(score.dtype)
    return ((score.square() * good).sum(1) / good.sum(1)).sqrt()


@register("zero_tprune")
class ZeroTPrune(ScoreReducer):
    """Prune by votes, drop look-alikes, vote again; nothing is trained. From a description only.

    At the block output, with A the block's attention (rows are queries):

    1. Vote: `s <- s A`, repeated, per head; heads are joined by a root mean square over those whose
       scores vary by an amount in `[min_variance, max_variance]`.
    2. Look-alikes: each token of the less important half finds the most similar one of the other
       half, by cosine of keys; those with the closest match are dropped, not merged.
    3. Vote again among the tokens that are left, and keep the most important.

    There is no official code and the paper's schedules (blocks and both counts) come from a search
    that is not published; any schedule works here. So this is not a reproduction.

    Args:
        start_from: "class": the class token starts with sqrt(N) times the importance of any other
            (the paper's default); "uniform": all start equal, for models without a class token.
        iterations: Votes per pass; null: 30, 5 and 1 in the first, middle and last third of the
            blocks (the description says 30 to 50, 5 to 10, and 1).
        similar_share: Share of the leaving tokens that go as look-alikes, where the schedule gives
            no count for them (ours). At most half of the tokens can.
        min_variance: Least variance over tokens of a head that counts.
        max_variance: Largest; null: any.

    Raises:
        ZooError: If an argument is out of range.

    References:
        Wang et al., CVPR 2024, arXiv 2305.17328; no official code was released.
    """

    card = Card(
        title="Zero-TPrune: Zero-Shot Token Pruning through Leveraging of the Attention Graph in "
        "Pre-Trained Transformers",
        authors="Wang et al.",
        venue="CVPR",
        year=2024,
        arxiv="2305.17328",
        code=None,
        licence=None,
        kind="prune",
        training="none",
        note="Built from a description of the paper, whose code is not public; compared with no "
        "reference.",
    )
    site = "post"
    drops = True
    family = "geometric"
    needs = frozenset({"attn", "k"})

    def __init__(
        self,
        start_from: str = "class",
        iterations: int | None = None,
        similar_share: float = 0.3,
        min_variance: float = 0.01,
        max_variance: float | None = 0.7,
    ) -> None:
        super().__init__()
        self.start_from = one_of("start_from", start_from, STARTS)
        self.iterations = count("iterations", iterations, null=True)
        self.similar_share = share("similar_share", similar_share)
        self.min_variance = number("min_variance", min_variance, 0)
        self.max_variance = number("max_variance", max_variance, null=True)
        if max_variance is not None and max_variance < min_variance:
            raise ZooError(
                f"expected 0 <= min_variance <= max_variance, got {min_variance} and {max_variance}"
            )

    @property
    def needs_class_token(self) -> bool:
        return self.start_from == "class"

    def acts(self, block: int, depth: int) -> bool:
        """Behind the last block nobody would read the result."""
        return block < depth - 1

    def score(self, t: Tokens, s: Signals, step: Step) -> Tensor:
        votes, similar = self._votes(step), self._similar(t.n, step)
        attn = s.need("attn").detach()
        live = torch.ones_like(t.size)
        score = live[:, t.prefix :]
        if similar:
            score = self._importance(attn, votes, t.prefix, None)
            gone = _look_alikes(s.need("k").detach()[:, :, t.prefix :].mean(1), score, similar)
            live = live.scatter(1, gone + t.prefix, 0.0)
        if t.n - similar > step.keep:
            score = self._importance(attn, votes, t.prefix, live if similar else None)
        return score.masked_fill(live[:, t.prefix :] == 0, -1.0)

    def _importance(self, attn: Tensor, votes: int, prefix: int, live: Tensor | None) -> Tensor:
        """Importance of the reducible tokens, `(B, N)`."""
        start = attn.new_ones(attn.shape[:3])
        if self.start_from == "class":
            start[..., 0] = attn.shape[-1] ** 0.5
        score = weighted_pagerank(attn, start, votes, live)[..., prefix:]
        among = torch.ones_like(score[:, 0]) if live is None else live[:, prefix:]
        return informative_mean(score, among, self.min_variance, self.max_variance)

    def _votes(self, step: Step) -> int:
        third = min(3 * step.block // step.depth, 2)
        return _ITERATIONS[third] if self.iterations is None else self.iterations

    def _similar(self, n: int, step: Step) -> int:
        """Tokens that leave as look-alikes."""
        drop = n - step.keep
        wanted = round(self.similar_share * drop)
        if step.budget.prune is not None:
            wanted = n - step.budget.prune
        return max(0, min(wanted, drop, n // 2))

    def macs(self, n: int, prefix: int, step: Step, dims: Dims) -> int:
        similar = self._similar(n, step)
        vote = dims.heads * (n + prefix) ** 2
        passes = self._votes(step) * vote
        total = 0
        if similar:
            total += passes + (n // 2) * (n - n // 2) * dims.head_dim
        if n - similar > step.keep:
            total += passes + (vote if similar else 0)
        return total


@torch.no_grad()
def _look_alikes(metric: Tensor, score: Tensor, count: int) -> Tensor:
    """The less important tokens with the closest match among the more important, `(B, count)`."""
    order = score.argsort(dim=1, descending=True)
    ranked = take_rows(metric, order)
    upper = ranked.shape[1] - ranked.shape[1] // 2
    _, similarity = most_similar(ranked[:, upper:], ranked[:, :upper])
    return order[:, upper:].gather(1, similarity.topk(count, dim=1, sorted=False).indices)
