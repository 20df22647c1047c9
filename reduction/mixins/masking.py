"""Methods that mask tokens while they train, instead of removing them."""

from __future__ import annotations

import torch

from reduction.counts import Step
from reduction.mixins.following import Remembers
from reduction.tokens import Signals, Tokens


class Masked(Remembers):
    """A method that removes tokens in evaluation and masks them in training.

    Comes before `Reducer` among the bases of a class: its `reduce` chooses between the two.
    """

    training: bool

    def masking(self) -> bool:
        """Whether tokens are masked in the pass that begins now."""
        return self.training

    def begin(self, t: Tokens) -> Tokens:
        """Training begins with all tokens in."""
        return t._replace(policy=torch.ones_like(t.size)) if self.masking() else t

    def mask(self, t: Tokens, s: Signals, step: Step) -> Tokens:
        """Mask what `remove` would take out in evaluation; arguments as of `Reducer.reduce`."""
        raise NotImplementedError(f"{type(self).__name__} must override mask")

    def remove(self, t: Tokens, s: Signals, step: Step) -> Tokens:
        """Really take tokens out: what `Reducer.reduce` does for other methods."""
        reduced: Tokens = super().reduce(t, s, step)  # type: ignore[misc]  # of the Reducer behind
        return reduced

    def reduce(self, t: Tokens, s: Signals, step: Step) -> Tokens:
        """Remove tokens, or mask them while training."""
        return self.mask(t, s, step) if self.masking() else self.remove(t, s, step)
