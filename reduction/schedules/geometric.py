"""The geometric schedule: the same share of the tokens leaves in every block."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from reduction.checks import is_list
from reduction.errors import ZooError
from reduction.schedules.base import Schedule
from reduction.schedules.keep_rate import KeepRate
from reduction.schedules.target import Target, register_family


class Geometric(KeepRate):
    """Keep `floor(n0 * rate ** s)` tokens after the s-th reducing block, by default after each.

    One number says how deep the model cuts, so `schedule=target_gmacs schedule.family=geometric`
    can solve for it.

    Args:
        rate: Share that each step keeps, in (0, 1].
        blocks: Blocks that reduce, from 0. None: all.
        strict: See `Schedule`.

    Raises:
        ZooError: If a value is out of range.
    """

    name = "geometric"

    def __init__(
        self, rate: float = 0.9, blocks: Sequence[int] | None = None, strict: bool = True
    ) -> None:
        if is_list(rate):
            raise ZooError(f"rate must be a number, got {rate!r}; lists belong to keep_rate")
        super().__init__(rate, blocks, rounding="floor", strict=strict)

    def stages(self, depth: int) -> list[int]:
        """Blocks that reduce.

        Raises:
            ZooError: If a block does not exist.
        """
        return list(range(depth)) if self.blocks is None else super().stages(depth)


def _family(target: Target, n0: int) -> Callable[[float], Schedule]:
    def make(strength: float) -> Schedule:
        return Geometric(max(1.0 - strength, 1e-6), blocks=target.blocks, strict=False)

    return make


register_family("geometric", _family)
