"""Methods that remember something from block to block within one forward pass."""

from __future__ import annotations

from collections.abc import Sequence

from reduction.counts import Step
from reduction.tokens import Signals, Tokens


class Remembers:
    """A method that prepares its memory, or a policy, before the first block."""

    def begin(self, t: Tokens) -> Tokens:
        """Before the first block: prepare `Tokens.memory` or `Tokens.policy`."""
        return t


class Follows(Remembers):
    """A method that follows what blocks say, also where it does not act."""

    def listens(self, block: int, steps: Sequence[Step | None]) -> bool:
        """Whether a block computes the signals in `Reducer.needs`."""
        raise NotImplementedError(f"{type(self).__name__} must override listens")

    def observe(self, t: Tokens, s: Signals, block: int) -> Tokens:
        """Behind a block that computed signals: note in `Tokens.memory` what they say."""
        return t


class Extends(Remembers):
    """A method whose memory has one entry per token, and keeps in step with plugins."""

    def extended(self, t: Tokens, added: int) -> Tokens:
        """After a plugin put `added` tokens behind the others: keep `Tokens.memory` in step."""
        raise NotImplementedError(f"{type(self).__name__} must override extended")
