"""Methods that look at the images themselves."""

from __future__ import annotations

from torch import Tensor

from reduction.tokens import Tokens


class SeesImages:
    """A method that notes something about the images, which tokens no longer tell exactly."""

    def see(self, images: Tensor, t: Tokens) -> Tokens:
        """Before the first block: note in `Tokens.memory` what the images `(B, C, H, W)` tell."""
        raise NotImplementedError(f"{type(self).__name__} must override see")
