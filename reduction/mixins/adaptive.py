"""Methods that keep a different number of tokens in every image."""

from __future__ import annotations


class Adaptive:
    """A method whose counts depend on the image, so that they are only known by running.

    `Reducer.count` is then what the schedule asks for: an upper limit.

    Attributes:
        limited: Whether the schedule is that limit. Without one, `count` is the number of tokens
            present: nothing leaves by plan, and no budget can be met.
        by_token: What it keeps in `Tokens.memory` with one entry per token, `(B, P+N, ...)` or
            `(B, N, ...)`, by name; all else there must be `(B, ...)`. None says nothing of it, and
            then a batch that carries memory is never cut into groups of similar length.
    """

    limited: bool = True
    by_token: frozenset[str] | None = None

    def together(self) -> bool:
        """Whether what becomes of an image depends on the others of its batch."""
        return False
