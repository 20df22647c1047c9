"""LTM: learned thresholds say which tokens merge."""

from __future__ import annotations

from dataclasses import replace

from reduction.methods.ltmp import ThresholdReducer
from reduction.registry import register


@register("ltm")
class LTM(ThresholdReducer):
    """Merge tokens that are alike enough.

    Between attention and MLP of every block: tokens alternate between senders and receivers, and a
    sender whose keys resemble a receiver's by more than the block's threshold joins it, in a
    size-weighted mean. One number per block is all that is learned. Arguments are
    those of `ltmp`.
    """

    card = replace(ThresholdReducer.card, kind="merge")
    merges = True
    first_merge = 1.0
    prop_attn = True
    needs = frozenset({"k"})

    def max_drop(self, n: int) -> int:
        return n // 2
