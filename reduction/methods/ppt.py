"""PPT: per image, prune where scores are uneven and pool where they are flat."""

from __future__ import annotations

import torch
from torch import Tensor

from reduction.assignment import Merge
from reduction.base import Card, Reducer
from reduction.counts import Dims, Step
from reduction.errors import ZooError
from reduction.functional.matching import bipartite_matching, head_sum, split_sizes
from reduction.functional.portable import stable_order
from reduction.mixins.ranking import attention_score, score_signal
from reduction.registry import register
from reduction.tokens import Signals, Tokens


def significance(attention: Tensor, v: Tensor) -> Tensor:
    """Share of each token in the attention of the class token, weighed by its value, `(B, N)`.

    Args:
        attention: Attention to each token `(B, N)`, up to a factor.
        v: Values `(B, H, N, d)`; their length is over all heads together.
    """
    exact = torch.promote_types(v.dtype, torch.float32)
    length = torch.linalg.vector_norm(v, dim=(1, 3), dtype=exact)
    score = attention.to(exact) * length
    share: Tensor = score / score.sum(1, keepdim=True).clamp_min(torch.finfo(exact).tiny)
    return share


@register("ppt")
class PPT(Reducer):
    """Token Pruning and Pooling.

    Between attention and MLP, a token's significance is the attention that the class token pays it
    times the length of its value, normalised over the patches. Where it varies much among the
    patches of an image, some are clearly dispensable and the least significant are pruned; where it
    is flat, similar tokens are pooled as in ToMe, into their size-weighted mean. Both leave the
    same number of tokens, so one batch can do both.

    The order of rows is part of the algorithm: patches by descending significance after pruning,
    ToMe's order after pooling.

    Args:
        threshold: Variance from which an image is pruned. The paper's: 7e-5 for DeiT-S off the
            shelf, 6e-5 for fine-tuned models. 0 always prunes, 1 always pools.
        patches: Patches in the image for which the threshold was chosen. For other grids it is
            scaled by `(patches / grid) ** 2`, because the variance of shares falls like that
            (ours). Null uses it as it is.
        prop_attn: Proportional attention. Without it pooling takes plain means, as in the official
            code, which then forgets the sizes before every stage.
        score_from: "class" (the paper's) or "column_mean" (attention received from all tokens;
            ours, for models without a class token).

    Raises:
        ZooError: If an argument is out of range.

    References:
        Wu et al., arXiv 2310.01812; official code github.com/xjwu1024/PPT (Apache-2.0, derived from
        ToMe; this implementation is written from a specification, not from that code).
    """

    card = Card(
        title="PPT: Token Pruning and Pooling for Efficient Vision Transformers",
        authors="Wu et al.",
        venue="arXiv",
        year=2023,
        arxiv="2310.01812",
        code="https://github.com/xjwu1024/PPT",
        licence="Apache-2.0",
        kind="prune or merge",
        training="none (fine-tuning optional)",
        note="The threshold was chosen for DeiT-S at 196 patches; other models need their own.",
    )
    site = "mid"
    # Half of the tokens at three stages is not enough for the smaller budgets.
    family = "geometric"

    def __init__(
        self,
        threshold: float = 7e-5,
        patches: int | None = 196,
        prop_attn: bool = True,
        score_from: str = "class",
    ) -> None:
        super().__init__()
        if isinstance(threshold, bool) or not isinstance(threshold, int | float) or threshold < 0:
            raise ZooError(f"threshold must be 0 or more, got {threshold!r}")
        if patches is not None and (isinstance(patches, bool) or patches < 1):
            raise ZooError(f"patches must be 1 or more, or null, got {patches!r}")
        self.threshold = threshold
        self.patches = patches
        self.prop_attn = prop_attn
        self.score_from = score_from
        self.needs = score_signal(score_from) | {"k", "v"}

    def max_drop(self, n: int) -> int:
        return n // 2

    def threshold_at(self, grid: tuple[int, int]) -> float:
        """Threshold for a patch grid."""
        scale = 1.0 if self.patches is None else (self.patches / (grid[0] * grid[1])) ** 2
        return self.threshold * scale

    @torch.no_grad()
    def assign(self, t: Tokens, s: Signals, step: Step) -> Merge:
        assert s.k is not None and s.v is not None
        score = significance(attention_score(s, self.score_from, t.prefix), s.v[:, :, t.prefix :])
        # An image pools where its scores are flat.
        pool = (score.var(1, keepdim=True) < self.threshold_at(step.grid)).expand(-1, t.n)
        order = stable_order(score, descending=True)
        match = bipartite_matching(head_sum(s.k[:, :, t.prefix :]), t.n - step.keep, t.prefix)
        rows = torch.arange(step.keep, device=order.device).expand(order.shape[0], -1)
        kept = torch.full_like(order, -1).scatter(1, order[:, : step.keep], rows)
        pooled = torch.zeros_like(order).scatter(1, match.leader, rows)
        pooled = pooled.scatter(1, match.source, match.target)
        slot = torch.where(pool, pooled, kept)
        leader = torch.where(pool[:, : step.keep], match.leader, order[:, : step.keep])
        if self.prop_attn:
            return Merge(slot, leader)
        held = slot.clamp_min(0)
        members = torch.zeros_like(leader).scatter_add(1, held, (slot >= 0).long())
        coef = members.gather(1, held).to(score.dtype).reciprocal()
        return Merge(slot, leader, coef=coef)

    def macs(self, n: int, prefix: int, step: Step, dims: Dims) -> int:
        senders, receivers = split_sizes(n, prefix)
        return senders * receivers * dims.head_dim
