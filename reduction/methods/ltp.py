"""LTP: learned thresholds say which tokens leave."""

from __future__ import annotations

from dataclasses import replace

from reduction.functional.thresholds import ThresholdReducer
from reduction.methods.ltmp import LTMP
from reduction.registry import register


@register("ltp")
class LTP(ThresholdReducer):
    """Prune tokens that receive too little attention.

    Between attention and MLP of every block: every token that receives no more attention (mean over
    heads and queries) than the block's threshold is dropped. One number per block is all that is
    learned.

    In training nothing is removed: masks with the gradient of a sigmoid take part in attention, and
    a loss pulls the cost to its target.

    Args:
        tau: Width of the sigmoids that stand for the thresholds in the backward pass.
        budget_weight: Factor of the budget loss.
        target: Cost relative to the dense model that the budget loss aims at, by the paper's
            formula; None is that of the schedule's counts.
        limit: Let no image keep more tokens in a block than the schedule says: the least
            important leave. Without it the thresholds alone decide, as in the paper, and counts of
            the schedule are expectations. Training does not know the limit.
        variant: How the training form treats tokens that are masked. "live": as removal does, so
            that both forms agree. "release": as the official code does; there masked
            tokens vote on importance.

    Raises:
        ZooError: If an argument is out of range.

    References:
        Bonnaerens and Dambre, TMLR 2023, arXiv 2307.10780; official code github.com/Mxbonn/ltmp
        (no licence file; this implementation is written from a specification, not from that code).
    """

    card = replace(LTMP.card, kind="prune")
    prunes = True
    needs = frozenset({"column"})
