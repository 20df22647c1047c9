"""Constant r: as many tokens leave in every block; ToMe's list and slanted forms."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

from reduction.checks import boolean, finite
from reduction.counts import Budget
from reduction.errors import ZooError
from reduction.schedules.base import Schedule


def parse_r(depth: int, r: float | Sequence[int], inflection: float | None = None) -> list[int]:
    """Tokens to remove in each block, in ToMe's three spellings.

    Args:
        depth: Number of blocks.
        r: One number for all blocks, or one per block; a short list is padded with zeros. A long
            one is returned as it is: blocks that do not exist never ask for their entry.
        inflection: With a single `r`: -1 removes `2r` in the first block and 0 in the last, 0 is
            constant, +1 increases from 0 to `2r`.

    Returns:
        At least `depth` integers.

    References:
        ToMe, arXiv 2210.09461, appendix; official code CC-BY-NC 4.0 (not used here).
    """
    if not isinstance(r, int | float):
        values = [int(v) for v in r]
        return values + [0] * (depth - len(values))
    if inflection is None:
        return [int(r)] * depth
    low = int(r * (1.0 - inflection))
    high = 2 * r - low
    step = (high - low) / max(depth - 1, 1)
    return [int(low + i * step) for i in range(depth)]


class ConstantR(Schedule):
    """Remove `r` tokens in every block, or ToMe's list and slanted forms.

    Args:
        r: An int; a list with one entry per block; or a fraction such as 12.5, which removes 12
            and 13 in turn.
        inflection: See `parse_r`.
        strict: Refuse to remove more than half of the tokens in the first block (for methods that
            merge pairs), or more than there are in all. Running short of pairs in later blocks is
            no error: less is removed there, as in the official ToMe.

    Raises:
        ZooError: If `r` is negative or `inflection` outside [-1, 1].
    """

    name = "constant_r"

    def __init__(
        self,
        r: float | Sequence[int],
        inflection: float | None = None,
        strict: bool = True,
    ) -> None:
        if isinstance(r, bool) or not isinstance(r, int | float | Sequence) or isinstance(r, str):
            raise ZooError(f"r must be a number or a list of integers, got {r!r}")
        values = [r] if isinstance(r, int | float) else list(r)
        if not values or not all(finite(v) and v >= 0 for v in values):
            raise ZooError(f"r must be 0 or more, got {r!r}")
        if not isinstance(r, int | float) and any(v != int(v) for v in values):
            raise ZooError(f"a list of r must hold integers, got {r!r}")
        if inflection is not None and not (finite(inflection) and -1 <= inflection <= 1):
            raise ZooError(f"inflection must be in [-1, 1], or null, got {inflection!r}")
        if inflection is not None and len(values) > 1:
            raise ZooError("inflection needs a single r, got a list")
        self.r: float | list[int] = r if isinstance(r, int | float) else [int(v) for v in values]
        self.inflection = inflection
        self.strict = boolean("strict", strict)

    def budget(self, block: int, depth: int, n: int, n0: int) -> Budget | None:
        r = self.r
        if isinstance(r, list) and len(r) > depth and block == 0:
            warnings.warn(
                f"r has {len(r)} entries for {depth} blocks; the rest is ignored", stacklevel=2
            )
        drop = self._drop(block, depth)
        return Budget(n - drop) if drop > 0 else None

    def _drop(self, block: int, depth: int) -> int:
        if isinstance(self.r, float) and self.inflection is None:
            return math.floor(self.r * (block + 1)) - math.floor(self.r * block)
        return parse_r(depth, self.r, self.inflection)[block]

    def refuses(self, block: int, depth: int, n: int, n0: int, limit: int) -> bool:
        # ToMe's published settings (r=16 on DeiT-S) run short of pairs in the last blocks and are
        # clipped there. What removes more than there is, or too much at once, is a mistake.
        budget = self.budget(block, depth, n, n0)
        if budget is None or n - budget.keep <= limit:
            return False
        return n == n0 or sum(self._drop(b, depth) for b in range(depth)) >= n0
