"""LTMP: learned thresholds say which tokens merge, and which leave."""

from __future__ import annotations

from reduction.base import Card
from reduction.functional.thresholds import ThresholdReducer
from reduction.registry import register


@register("ltmp")
class LTMP(ThresholdReducer):
    """Merge tokens that are alike enough, then prune those that receive too little attention.

    Between attention and MLP of every block: tokens alternate between senders and receivers, and a
    sender whose keys resemble a receiver's by more than the block's merging threshold joins it, in
    a size-weighted mean that is as important as its most important member. Then every token that
    receives no more attention (mean over heads and queries) than the pruning threshold is dropped.
    Two numbers per block are all that is learned.

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
            tokens vote on importance and hold their place in the split.

    Raises:
        ZooError: If an argument is out of range.

    References:
        Bonnaerens and Dambre, TMLR 2023, arXiv 2307.10780; official code github.com/Mxbonn/ltmp
        (no licence file; this implementation is written from a specification, not from that code).
    """

    card = Card(
        title="Learned Thresholds Token Merging and Pruning for Vision Transformers",
        authors="Bonnaerens and Dambre",
        venue="TMLR",
        year=2023,
        arxiv="2307.10780",
        code="https://github.com/Mxbonn/ltmp",
        licence="none",
        kind="merge + prune",
        training="thresholds alone, backbone frozen",
        note="Counts depend on the image; the schedule limits them, unless limit=false.",
    )
    merges = True
    first_merge = 0.9
    prop_attn = True
    prunes = True
    needs = frozenset({"k", "column"})
