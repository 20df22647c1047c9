"""Methods that put tokens aside and bring them back."""

from __future__ import annotations

from typing import Literal

from reduction.tokens import Tokens


class Parks:
    """A method whose removed tokens are not gone.

    Attributes:
        parks: When they come back: before the next step and behind the last block ("stage"), or
            behind every block, and then a step lasts until the next one ("block"); "no" where an
            option keeps them from being parked. Counts are planned so.
    """

    parks: Literal["no", "stage", "block"] = "stage"

    def restores(self, block: int, depth: int) -> bool:
        """Whether tokens that are parked behind this block, where it is their turn, come back."""
        return True

    def restore(self, t: Tokens) -> Tokens:
        """Put parked tokens back, see `parks`."""
        raise NotImplementedError(f"{type(self).__name__} must override restore")
