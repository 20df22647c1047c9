"""Methods that say how dense features come back from the tokens that are left."""

from __future__ import annotations


class Restores:
    """A method with a way of its own to give every input patch features again.

    Attributes:
        restore: "copy": the token that holds the patch; anything else is the method's.
    """

    restore: str = "copy"
