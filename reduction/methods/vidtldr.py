"""vid-TLDR: merge, and let what is not looked at count for less."""

from __future__ import annotations

import torch

from reduction.assignment import Merge
from reduction.base import Card
from reduction.checks import boolean
from reduction.counts import Dims, Step
from reduction.functional.attention import attention_bias
from reduction.functional.joining import Decision
from reduction.functional.matching import bipartite_matching, split_sizes
from reduction.functional.scores import saliency
from reduction.functional.settling import weighed
from reduction.mixins.attention import AttentionInput, AttentionOutput, OwnAttention
from reduction.mixins.pairing import Pairs, live_tokens
from reduction.registry import register
from reduction.tokens import Signals, Tokens


@register("vidtldr")
class VidTLDR(OwnAttention, Pairs):
    """Saliency-aware token merging, the image part of vid-TLDR.

    Between attention and MLP, pairs merge as in ToMe (by the cosine of features), but a token that
    joins another counts only by its saliency `w`: how focused its attention is, zero below the
    mean.
    With `s` the sizes, a receiver b and those that join it become

        s_b' = s_b + sum w_a s_a        x_b' = (s_b x_b + sum w_a s_a x_a) / s_b'

    A token of weight zero leaves no trace. Sizes are masses, no counts. Saliency is taken from the
    attention without the size bias, which the later attentions themselves have.

    Args:
        prop_attn: Proportional attention, with these masses.

    References:
        Choi et al., CVPR 2024, arXiv 2403.13347; official code github.com/mlvlab/vid-TLDR (MIT;
        this implementation is written from a specification).
    """

    card = Card(
        title="vid-TLDR: Training Free Token merging for Light-weight Video Transformer",
        authors="Choi et al.",
        venue="CVPR",
        year=2024,
        arxiv="2403.13347",
        code="https://github.com/mlvlab/vid-TLDR",
        licence="MIT",
        kind="merge",
        training="none",
        note="Made for video models without a class token; the image part is here. Tokens of the "
        "background are pruned.",
    )
    site = "mid"
    needs = frozenset({"attn"})
    family = "constant_r"

    def __init__(self, prop_attn: bool = True) -> None:
        super().__init__()
        self.prop_attn = boolean("prop_attn", prop_attn)

    def max_drop(self, n: int) -> int:
        return n // 2

    def inside(self, t: Tokens) -> bool:
        """Where sizes would show in the map."""
        return self.prop_attn and not t.unit

    def attend(self, a: AttentionInput, t: Tokens, step: Step | None) -> AttentionOutput | None:
        """The usual output, and the map that there would be without sizes."""
        if step is None:
            return None
        out, _ = a._replace(need=frozenset()).usual()
        with torch.no_grad():
            sizes = attention_bias(t.size, None, t.x.dtype)
            assert sizes is not None
            map_ = a.plus(-sizes).logits().softmax(-1)
        return AttentionOutput(out, Signals(attn=map_))

    @torch.no_grad()
    def assign(self, t: Tokens, s: Signals, step: Step) -> Merge:
        weight = saliency(s.need("attn"), t.prefix)
        match = bipartite_matching(t.patches, t.n - step.keep, t.prefix)
        stay = match.leader.shape[1] - split_sizes(t.n, t.prefix)[1]
        # Without a class token, too, those that stay are in their order.
        leader = match.leader
        leader = torch.cat([leader[:, :stay].sort(dim=1).values, leader[:, stay:]], dim=1)
        place = torch.arange(leader.shape[1], device=leader.device).expand_as(leader)
        slot = torch.zeros_like(weight, dtype=torch.int64).scatter(1, leader, place)
        slot = slot.scatter(1, match.source, match.target)
        sent = torch.ones_like(weight).scatter(1, match.source, weight.gather(1, match.source))
        return weighed(t, Merge(slot, leader), sent)

    def joins(self, t: Tokens, s: Signals, step: Step, d: Decision) -> Merge:
        weight = saliency(s.need("attn"), t.prefix, live_tokens(t))
        sent = d.of_tokens(weight.gather(1, d.pairs.senders), torch.ones_like(weight))
        return weighed(t, d.joined(t), sent)

    def macs(self, n: int, prefix: int, step: Step, dims: Dims) -> int:
        senders, receivers = split_sizes(n, prefix)
        matching = senders * receivers * dims.width
        # Behind the first merge the map without sizes is one more product of queries and keys.
        sized = self.prop_attn and n < step.grid[0] * step.grid[1]
        return matching + (n + prefix) ** 2 * dims.width * sized
