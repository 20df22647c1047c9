"""Keep rates: a share of the tokens stays at chosen blocks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from reduction.checks import boolean, count, is_list, listed, one_of, shares
from reduction.counts import Budget
from reduction.errors import ZooError
from reduction.schedules.base import Schedule

_ROUNDING: dict[str, Callable[[float], int]] = {"int": int, "floor": math.floor, "ceil": math.ceil}


class KeepRate(Schedule):
    """Keep a share of the tokens at chosen blocks.

    Papers round differently, so rounding belongs to the schedule. With `of="initial"` stage s
    keeps `int(n0 * rate ** (s + 1))`; with `of="current"` it keeps `ceil(rate * n)` or the like.

    Args:
        rate: Keep rate in (0, 1]. A list gives each stage its own share: of the initial count
            (not compounded) or of the current one.
        blocks: Blocks that reduce, from 0. None: the quarter points of the depth (3, 6, 9 of 12);
            "all": every block.
        rounding: "int", "floor" or "ceil".
        of: "initial" or "current".
        strict: See `Schedule`.
        prefix: How many prefix tokens the counts include (some papers take their share of the
            whole sequence).
        nominal_r: Remove in each stage what lies between its count and that of the stage before,
            however many are there: what a method could not remove, no later stage makes up for.
            So the stage-wise ToMe of Haurum et al. With `of="initial"`, and as a rule
            `strict=False`.

    Raises:
        ZooError: If a value is out of range.
    """

    name = "keep_rate"

    def __init__(
        self,
        rate: float | Sequence[float] = 0.7,
        blocks: Sequence[int] | str | None = None,
        rounding: str = "int",
        of: str = "initial",
        strict: bool = True,
        prefix: int = 0,
        nominal_r: bool = False,
    ) -> None:
        if of not in ("initial", "current"):
            raise ZooError(f"of must be 'initial' or 'current', got {of!r}")
        self.rate = shares("keep rate", rate)
        rates = self.rate if isinstance(self.rate, list) else [self.rate]
        if isinstance(blocks, str):
            if blocks != "all":
                raise ZooError(f"blocks must be a list, null or 'all', got {blocks!r}")
            if is_list(rate):
                raise ZooError("a list of rates needs blocks=[...]")
        elif blocks is not None:
            blocks = [
                count("blocks", b, 0) for b in listed("blocks", blocks, "a list, null or 'all'")
            ]
            if not blocks:
                raise ZooError("blocks is an empty list: nothing would be reduced; name some")
            if sorted(set(blocks)) != blocks:
                raise ZooError(f"blocks must be increasing and distinct, got {blocks}")
            if len(rates) not in (1, len(blocks)):
                raise ZooError(f"{len(rates)} rates for {len(blocks)} blocks; give one or as many")
            if is_list(rate):
                self.rate = rates * len(blocks) if len(rates) == 1 else rates
        elif is_list(rate):
            raise ZooError("a list of rates needs blocks=[...]")
        self.blocks: list[int] | str | None = blocks
        self.rounding = one_of("rounding", rounding, sorted(_ROUNDING))
        self.of = of
        self.strict = boolean("strict", strict)
        self.prefix = count("prefix", prefix, 0)
        self.nominal_r = boolean("nominal_r", nominal_r)
        if nominal_r and of != "initial":
            raise ZooError(f"nominal_r=true goes with of='initial', got of={of!r}")

    def stages(self, depth: int) -> list[int]:
        """Blocks that reduce.

        Raises:
            ZooError: If a block does not exist.
        """
        if self.blocks is None:
            return sorted({depth * q // 4 for q in (1, 2, 3)} - {0}) or [0]
        if isinstance(self.blocks, str):
            return list(range(depth))
        if any(not 0 <= b < depth for b in self.blocks):
            raise ZooError(f"blocks must be in 0..{depth - 1}, got {self.blocks}")
        return list(self.blocks)

    def budget(self, block: int, depth: int, n: int, n0: int) -> Budget | None:
        stages = self.stages(depth)
        if block not in stages:
            return None
        stage = stages.index(block)
        if self._rate_of(stage) == 1 and not self.nominal_r:
            return None
        if not self.nominal_r:
            return Budget(self._keep(stage, n, n0))
        before = n0 if stage == 0 else min(n0, self._keep(stage - 1, n0, n0))
        removed = before - min(before, self._keep(stage, n0, n0))
        return Budget(max(1, n - removed)) if removed else None

    def _rate_of(self, stage: int) -> float:
        return self.rate[stage] if isinstance(self.rate, list) else self.rate

    def _keep(self, stage: int, n: int, n0: int) -> int:
        """Tokens that a stage keeps."""
        rate = self._rate_of(stage)
        n, n0 = n + self.prefix, n0 + self.prefix
        if self.of == "current":
            share = rate * n
        else:
            share = rate * n0 if isinstance(self.rate, list) else n0 * rate ** (stage + 1)
        return max(1, _ROUNDING[self.rounding](share) - self.prefix)
