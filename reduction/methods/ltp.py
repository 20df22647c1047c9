"""LTP: learned thresholds say which tokens leave."""

from __future__ import annotations

from dataclasses import replace

from reduction.methods.ltmp import ThresholdReducer
from reduction.registry import register


@register("ltp")
class LTP(ThresholdReducer):
    """Prune tokens that receive too little attention.

    Between attention and MLP of every block: every token that receives no more attention (mean over
    heads and queries) than the block's threshold is dropped. One number per block is all that is
    learned. Arguments are those of `ltmp`.
    """

    card = replace(ThresholdReducer.card, kind="prune")
    prunes = True
    needs = frozenset({"column"})
