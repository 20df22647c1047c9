"""Methods that bring losses of their own, and what those may look at."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from reduction.schedules.base import Schedule
from reduction.tokens import Tokens


class Outcome(NamedTuple):
    """What a reducer's own losses may look at.

    Attributes:
        trace: State after each block, features included.
        final: State after the last block and the final norm.
        logits: `(B, classes)`.
        targets: Labels `(B,)` or soft labels `(B, classes)`.
        teacher: The same of the frozen dense model on the same images, if `needs_teacher`; or
            of the same weights under another schedule, if there is a `Trains.peer`.
    """

    trace: tuple[Tokens, ...]
    final: Tokens
    logits: Tensor
    targets: Tensor
    teacher: Outcome | None = None


class Trains:
    """A method with losses of its own.

    Attributes:
        needs_teacher: `auxiliary_losses` compares with the frozen dense model.
        class_weight: Factor of the classification loss that the others are added to.
    """

    needs_teacher: bool = False
    class_weight: float = 1.0

    def auxiliary_losses(self, outcome: Outcome) -> dict[str, Tensor]:
        """Losses to add to the classification loss while training, by name, weights included."""
        raise NotImplementedError(f"{type(self).__name__} must override auxiliary_losses")

    def peer(self, schedule: Schedule) -> Schedule | None:
        """Another schedule under which training also runs the same weights on the same images.

        The result is `Outcome.teacher`, with gradients. None: no second pass.
        """
        return None
