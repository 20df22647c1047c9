"""FasterVLM: the patches that the class token looks at most."""

from __future__ import annotations

from reduction.base import Card
from reduction.selection.base import Selection, Selector, choose, whole_number
from reduction.selection.given import Given
from reduction.selection.ranking import top
from reduction.selection.registry import register_selector


@register_selector("fastervlm")
class FasterVLM(Selector):
    """Keep the K patches with the highest attention of the class token, mean over heads.

    Args:
        compat: Makes no difference here.

    References:
        Zhang et al., arXiv 2412.01818v1; official code github.com/Theia-4869/FasterVLM
        (Apache-2.0).
    """

    card = Card(
        title="[CLS] Attention is All You Need for Training-Free Visual Token Pruning: Make VLM "
        "Inference Faster",
        authors="Zhang et al.",
        venue="arXiv",
        year=2024,
        arxiv="2412.01818",
        code="https://github.com/Theia-4869/FasterVLM",
        licence="Apache-2.0",
        kind="attention",
        training="none",
    )
    reads = ("attention",)

    def pick(self, given: Given, keep: int | None) -> Selection:
        """See `Selector`."""
        k = whole_number(keep, "fastervlm")
        return choose(given, top(given.attention("fastervlm"), k))
