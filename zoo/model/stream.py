"""From images to logits."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from reduction.tokens import Tokens


class Info(NamedTuple):
    """What happened to the tokens in one forward pass.

    Attributes:
        tokens: `(entering, leaving)` per block, prefix tokens included.
        size: Patches that each final token stands for, `(B, P+N)`.
        source: Final slot of each input patch `(B, N0)`, -1 where it was dropped. Slots count
            reducible tokens from 0.
        grid: Patch grid `(rows, columns)`.
        trace: State after each block, if asked for with `return_info="trace"`.
        final: State after the last block, before the final norm.
    """

    tokens: tuple[tuple[int, int], ...]
    size: Tensor
    source: Tensor
    grid: tuple[int, int]
    trace: tuple[Tokens, ...]
    final: Tokens

    @property
    def sizes(self) -> Tensor:
        """Another name of `size`."""
        return self.size
