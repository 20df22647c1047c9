"""Methods that keep a different number of tokens in every image."""

from __future__ import annotations


class Adaptive:
    """A method whose counts depend on the image, so that they are only known by running.

    `Reducer.count` is then what the schedule asks for: an upper limit.

    Attributes:
        limited: Whether the schedule is that limit. Without one, `count` is the number of tokens
            present: nothing leaves by plan, and no budget can be met.
    """

    limited: bool = True
