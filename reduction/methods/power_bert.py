"""PoWER-BERT's soft extraction: tokens fade out by rank while token counts are searched for.

No method of its own to choose by name: the search puts it in place of one.
"""

from __future__ import annotations

import torch
from torch import nn

from reduction.base import Reducer
from reduction.counts import Step
from reduction.functional.portable import stable_order
from reduction.mixins.answer import OwnAnswer
from reduction.mixins.attention import AttentionInput, AttentionOutput, OwnAttention
from reduction.mixins.following import Remembers
from reduction.tokens import Signals, Tokens


class SoftExtract(OwnAttention, OwnAnswer, Remembers, Reducer):
    """Fade tokens out by their rank instead of removing them.

    In every block, tokens are sorted by the attention they receive from all others, and whatever
    the token in place p contributes to a later attention is multiplied by `retention[block, p]`.
    Only a token that has reached zero also leaves the normalisation of the softmax. So ones and
    zeros are exactly removal, and lowering all factors together is not free.

    PoWER-BERT multiplies the token's vector instead. In a transformer that normalises in front of
    its layers that has no effect: the normalisation takes the factor out again.

    Args:
        retention: Factors in [0, 1], `(depth, N)`.
    """

    site = "mid"
    needs = frozenset({"attn"})
    every_block = True

    def __init__(self, retention: nn.Parameter) -> None:
        super().__init__()
        self.retention = retention

    def begin(self, t: Tokens) -> Tokens:
        """Every token counts fully."""
        return t._replace(policy=torch.ones_like(t.size))

    def attend(self, a: AttentionInput, t: Tokens, step: Step | None) -> AttentionOutput:
        """Attention in which fading tokens contribute less and faded ones nothing."""
        assert t.policy is not None
        logits = (a.q * a.scale) @ a.k.transpose(-2, -1)
        if a.bias is not None:
            logits = logits + a.bias
        gone = (t.policy == 0)[:, None, None, :]
        # The lowest finite number: a row in which everything is gone stays finite.
        logits = logits.masked_fill(gone, torch.finfo(logits.dtype).min)
        map_ = logits.softmax(-1) * t.policy[:, None, None, :].to(logits.dtype)
        out = a.dropped(map_) @ a.v
        return AttentionOutput(out, Signals(attn=map_))

    def reduce(self, t: Tokens, s: Signals, step: Step) -> Tokens:
        """Lower the policy of tokens far down in the order."""
        assert t.policy is not None
        attn = s.need("attn")
        with torch.no_grad():
            # What a token pays to itself says nothing about its use to others, and what a faded
            # token pays counts as little as the token.
            paid = attn.mean(1) * t.policy.unsqueeze(2)
            own = paid.diagonal(dim1=1, dim2=2)
            received = (paid.sum(1) - own)[:, t.prefix :]
            place = stable_order(received, descending=True).argsort(dim=1)
        kept = t.policy[:, t.prefix :] * self.retention[step.block][place]
        return t._replace(policy=torch.cat([t.policy[:, : t.prefix], kept], dim=1))

    def finish(self, t: Tokens) -> Tokens:
        """Let a head that averages weigh the tokens as the attention did."""
        assert t.policy is not None
        return t._replace(size=t.policy.clamp_min(1e-6).to(t.size.dtype), unit=False)
