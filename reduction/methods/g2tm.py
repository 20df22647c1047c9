"""G2TM: neighbours that look alike form a graph, and each of its components becomes one token."""

from __future__ import annotations

import torch

from reduction.assignment import Merge
from reduction.base import Card, Reducer
from reduction.checks import count, number, one_of
from reduction.counts import Step
from reduction.errors import ZooError
from reduction.functional.attention import attention_bias
from reduction.functional.components import components, edges
from reduction.functional.matching import unit
from reduction.functional.thresholds import grouped
from reduction.mixins.adaptive import Adaptive
from reduction.mixins.attention import AttentionInput, AttentionOutput, OwnAttention
from reduction.registry import register
from reduction.tokens import Signals, Tokens

ATTENTIONS = ("none", "prop", "iprop")


@register("g2tm")
class G2TM(Adaptive, OwnAttention, Reducer):
    """Graph-Guided Token Merging: one merge, early, of connected patches.

    In one block, between attention and MLP, each patch is joined with those of its four neighbours
    whose cosine is above a threshold. A connected component becomes the mean of its members, at the
    place of the first of them. A component has no limit in diameter: a smooth ramp of patches that
    resemble their neighbours collapses into one token.

    Args:
        layer: Where, counted from 1 as in the paper.
        threshold: Cosine above which neighbours are joined.
        attention: Later attentions: "none" (sizes do not count), "prop" (`+ log(size)`) or "iprop"
            (`- log(size)`, the paper's inverse proportional attention).

    Raises:
        ZooError: If an argument is out of range.

    References:
        Bercy et al., VISAPP 2026; official code github.com/vbercy/g2tm (Apache-2.0).
    """

    card = Card(
        title="G2TM: Single-Module Graph-Guided Token Merging for Efficient Semantic Segmentation",
        authors="Bercy et al.",
        venue="VISAPP",
        year=2026,
        arxiv=None,
        code="https://github.com/vbercy/g2tm",
        licence="Apache-2.0",
        kind="merge",
        training="none (fine-tuning recommended)",
        note="A threshold decides, not the schedule: counts depend on the image and have no limit.",
    )
    site = "mid"
    no_thresholds = "it has a threshold of its own; type reducer.threshold=0.9"
    family = "constant_r"
    every_block = True
    limited = False
    added_tokens = "spare"

    def __init__(self, layer: int = 2, threshold: float = 0.88, attention: str = "none") -> None:
        super().__init__()
        self.layer = count("layer", layer)
        self.threshold = number("threshold", threshold)
        self.attention = one_of("attention", attention, ATTENTIONS)
        self.prop_attn = attention == "prop"

    def acts(self, block: int, depth: int) -> bool:
        return block == self.layer - 1

    def count(self, n: int, step: Step) -> int:
        """As many as there are: no component is known before the images are."""
        return n

    def inside(self, t: Tokens) -> bool:
        return self.attention == "iprop" and not self.prop_attn and not t.unit

    def attend(self, a: AttentionInput, t: Tokens, step: Step | None) -> AttentionOutput | None:
        bias = attention_bias(t.size.clamp_min(1e-6).reciprocal(), None, t.x.dtype)
        out, signals = a.plus(bias).usual()
        return AttentionOutput(out, signals)

    @torch.no_grad()
    def assign(self, t: Tokens, s: Signals, step: Step) -> Merge:
        if t.n != step.grid[0] * step.grid[1] or t.mask is not None:
            raise ZooError(
                f"g2tm needs all {step.grid[0] * step.grid[1]} patches in their raster, got {t.n} "
                "tokens; switch patch dropout off"
            )
        exact = torch.promote_types(t.x.dtype, torch.float32)
        head = components(*edges(unit(t.patches.to(exact)), step.grid, self.threshold))
        live = torch.ones_like(head, dtype=torch.bool)
        index = torch.arange(t.n, device=head.device, dtype=exact).expand_as(head)
        return grouped(head, index, live, None)
