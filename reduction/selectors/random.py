"""Random tokens: the control that every selector has to beat."""

from __future__ import annotations

from reduction.base import Card
from reduction.functional.lots import draw, lots, seed_or_torchs
from reduction.selection.base import Compat, Selection, Selector, choose, whole_number
from reduction.selection.given import Given
from reduction.selection.registry import register_selector


@register_selector("random")
class RandomTokens(Selector):
    """Keep tokens drawn by lot; the draw follows from the seed and the features of the image.

    Args:
        seed: Another seed, another draw; None is torch's own when the selector is made.
        compat: Makes no difference here.

    References:
        No paper of its own; the baseline of arXiv 2511.02650.
    """

    card = Card(
        title="Random tokens (control)",
        authors="folklore",
        venue="none",
        year=2021,
        arxiv=None,
        code=None,
        licence=None,
        kind="control",
        training="none",
        note="A control, not a method: use several seeds, and report mean and spread.",
    )

    def __init__(self, seed: int | None = 0, compat: Compat | None = None) -> None:
        super().__init__(compat)
        self.seed = seed_or_torchs(seed)

    def pick(self, given: Given, keep: int | None) -> Selection:
        """See `Selector`."""
        k = whole_number(keep, "random")
        return choose(given, draw(lots(given.x), given.n, k, self.seed, 0))
