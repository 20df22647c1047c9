"""Methods that switch parts of a block on and off."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from reduction.tokens import Tokens


class MlpGates(NamedTuple):
    """What the MLP of a block is switched by.

    Attributes:
        features: Factor on its input, broadcastable to `(B, P+N, C)`.
        branch: Factor on what it adds, likewise.
    """

    features: Tensor
    branch: Tensor


class Gates:
    """A method that switches what attention and MLP add, in every block that has a step.

    Comes with `OwnAttention`: what is decided there travels in `Tokens.memory`.
    """

    def attention_gate(self, t: Tokens) -> Tensor:
        """Factor on what the attention adds, broadcastable to `(B, P+N, C)`."""
        raise NotImplementedError(f"{type(self).__name__} must override attention_gate")

    def mlp_gates(self, t: Tokens) -> MlpGates:
        """Factors of the MLP."""
        raise NotImplementedError(f"{type(self).__name__} must override mlp_gates")

    def ungate(self, t: Tokens) -> Tokens:
        """Behind the block: bring back what was put aside."""
        return t
