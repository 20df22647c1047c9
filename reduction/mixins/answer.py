"""Methods that have a say behind the last block."""

from __future__ import annotations

from torch import Tensor, nn

from reduction.tokens import Tokens


class OwnAnswer:
    """A method that changes the final tokens, or answers instead of the head.

    Attributes:
        reads_last_block: Whether what the last block does to tokens other than the prefix can
            reach the answer in evaluation mode.
    """

    reads_last_block: bool = True

    def finish(self, t: Tokens) -> Tokens:
        """After the last block, before the final norm."""
        return t

    def logits(self, backbone: nn.Module, t: Tokens) -> Tensor | None:
        """Logits from the final tokens (before the final norm), or None for the usual head."""
        return None
