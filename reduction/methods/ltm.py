"""LTM: learned thresholds say which tokens merge."""

from __future__ import annotations

from dataclasses import replace

from reduction.functional.thresholds import ThresholdReducer
from reduction.methods.ltmp import LTMP
from reduction.registry import register


@register("ltm")
class LTM(ThresholdReducer):
    """Merge tokens that are alike enough.

    Between attention and MLP of every block: tokens alternate between senders and receivers, and a
    sender whose keys resemble a receiver's by more than the block's threshold joins it, in a
    size-weighted mean. One number per block is all that is learned.

    In training nothing is removed: masks with the gradient of a sigmoid take part in attention, and
    a loss pulls the cost to its target.

    Args:
        tau: Width of the sigmoids that stand for the thresholds in the backward pass.
        budget_weight: Factor of the budget loss.
        target: Cost relative to the dense model that the budget loss aims at, by the paper's
            formula; None is that of the schedule's counts.
        limit: Let no image keep more tokens in a block than the schedule says: the most
            similar further pairs merge. Without it the thresholds alone decide, as in the paper,
            and counts of the schedule are expectations. Training does not know the limit.
        variant: How the training form treats tokens that are masked. "live": as removal does, so
            that both forms agree. "release": as the official code does; there masked
            tokens hold their place in the split.

    Raises:
        ZooError: If an argument is out of range.

    References:
        Bonnaerens and Dambre, TMLR 2023, arXiv 2307.10780; official code github.com/Mxbonn/ltmp
        (no licence file; this implementation is written from a specification, not from that code).
    """

    card = replace(LTMP.card, kind="merge")
    merges = True
    first_merge = 1.0
    prop_attn = True
    needs = frozenset({"k"})

    def max_drop(self, n: int) -> int:
        return n // 2
