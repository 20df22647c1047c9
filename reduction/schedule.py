"""How many tokens each block keeps, apart from which ones.

A schedule answers one question with plain integers: given block, depth, the tokens entering and
the tokens at the start, what is the budget? So any method runs under any schedule, and the cost
of a run is known before it starts. Counts are of reducible tokens: prefix tokens are never in
them unless a schedule says so.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from reduction.base import Budget, constructor_arguments
from reduction.errors import UnknownName, ZooError

_SCHEDULES: dict[str, type[Schedule]] = {}
_ROUNDING: dict[str, Callable[[float], int]] = {"int": int, "floor": math.floor, "ceil": math.ceil}


class Schedule:
    """Base of all schedules. Subclasses set `name` and write `budget`.

    Attributes:
        name: Registry name.
        strict: Refuse at construction of the model what the method cannot remove. With False
            the request is clipped to what it can, as the official ToMe does.
    """

    name: ClassVar[str] = ""
    strict: bool = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.name:
            _SCHEDULES[cls.name] = cls

    def budget(self, block: int, depth: int, n: int, n0: int) -> Budget | None:
        """Budget of one block.

        Args:
            block: Index of the block, from 0.
            depth: Number of blocks.
            n: Reducible tokens entering the block.
            n0: Reducible tokens at the start.

        Returns:
            The budget, or None where nothing happens.
        """
        raise NotImplementedError

    def refuses(self, block: int, depth: int, n: int, n0: int, limit: int) -> bool:
        """Whether asking for more than `limit` removals here is an error, not a matter of clipping.

        One token too many is rounding: half of 49 cannot be kept by a method that merges pairs.
        """
        budget = self.budget(block, depth, n, n0)
        return budget is not None and n - budget.keep > limit + 1

    def config(self) -> dict[str, Any]:
        """Registry name and arguments: enough to build the schedule again."""
        return {"name": self.name, **constructor_arguments(self)}

    def __repr__(self) -> str:
        args = ", ".join(f"{k}={v!r}" for k, v in constructor_arguments(self).items())
        return f"{type(self).__name__}({args})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Schedule) and self.config() == other.config()

    def __hash__(self) -> int:
        return hash(json.dumps(self.config(), sort_keys=True))


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
        if not values or any(isinstance(v, bool) or not v >= 0 for v in values):
            raise ZooError(f"r must be 0 or more, got {r!r}")
        if not isinstance(r, int | float) and any(v != int(v) for v in values):
            raise ZooError(f"a list of r must hold integers, got {r!r}")
        if inflection is not None and not -1 <= inflection <= 1:
            raise ZooError(f"inflection must be in [-1, 1], got {inflection!r}")
        if inflection is not None and len(values) > 1:
            raise ZooError("inflection needs a single r, got a list")
        self.r: float | list[int] = r if isinstance(r, int | float) else [int(v) for v in values]
        self.inflection = inflection
        self.strict = strict

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
    ) -> None:
        rates = [rate] if isinstance(rate, int | float) else list(rate)
        for value in rates:
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
                raise ZooError(f"keep rate must be in (0, 1], got {value!r}")
        if rounding not in _ROUNDING:
            raise ZooError(f"rounding must be one of {sorted(_ROUNDING)}, got {rounding!r}")
        if of not in ("initial", "current"):
            raise ZooError(f"of must be 'initial' or 'current', got {of!r}")
        if isinstance(prefix, bool) or not isinstance(prefix, int) or prefix < 0:
            raise ZooError(f"prefix must be 0 or more tokens, got {prefix!r}")
        if isinstance(blocks, str):
            if blocks != "all":
                raise ZooError(f"blocks must be a list, null or 'all', got {blocks!r}")
            if len(rates) > 1:
                raise ZooError("a list of rates needs blocks=[...]")
        elif blocks is not None:
            blocks = [int(b) for b in blocks]
            if sorted(set(blocks)) != blocks:
                raise ZooError(f"blocks must be increasing and distinct, got {blocks}")
            if len(rates) not in (1, len(blocks)):
                raise ZooError(f"{len(rates)} rates for {len(blocks)} blocks; give one or as many")
        elif len(rates) > 1:
            raise ZooError("a list of rates needs blocks=[...]")
        self.rate: float | list[float] = rate if isinstance(rate, int | float) else rates
        self.blocks: list[int] | str | None = blocks
        self.rounding = rounding
        self.of = of
        self.strict = strict
        self.prefix = prefix

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
        round_ = _ROUNDING[self.rounding]
        n, n0 = n + self.prefix, n0 + self.prefix
        if isinstance(self.rate, list):
            rate = self.rate[stage]
            share = rate * (n if self.of == "current" else n0)
        elif self.of == "current":
            rate = self.rate
            share = rate * n
        else:
            rate = self.rate
            share = n0 * rate ** (stage + 1)
        if rate == 1:
            return None
        return Budget(max(1, round_(share) - self.prefix))


class PerBlock(Schedule):
    """One count per block, as a list or from a JSON file.

    Args:
        keep: Tokens to keep after each block; None in the list means nothing happens there.
        prune: Tokens that survive pruning, before merging leaves `keep` (DiffRate's two lists).
        prefix: How many prefix tokens the counts include; DiffRate's lists count the class token,
            so 1 there.
        file: JSON with "keep" and optionally "prune" and "prefix" instead of the lists.
        strict: See `Schedule`.

    Raises:
        ZooError: If counts are not positive integers, lengths differ, or the file is unreadable.
    """

    name = "per_block"

    def __init__(
        self,
        keep: Sequence[int | None] | None = None,
        prune: Sequence[int | None] | None = None,
        prefix: int = 0,
        file: str | None = None,
        strict: bool = True,
    ) -> None:
        if file is not None:
            if keep is not None or prune is not None:
                raise ZooError("give per_block either lists or a file, not both")
            keep, prune, prefix = _read_counts(file)
        if not keep:
            raise ZooError("per_block needs keep=[...] with one count per block, or file=PATH")
        self.keep = _counts("keep", keep, prefix)
        self.prune = None if prune is None else _counts("prune", prune, prefix)
        if self.prune is not None and len(self.prune) != len(self.keep):
            raise ZooError(f"keep has {len(self.keep)} entries but prune {len(self.prune)}")
        self.prefix = prefix
        self.file = None  # the lists are the record; a path would not travel with a checkpoint
        self.strict = strict

    def budget(self, block: int, depth: int, n: int, n0: int) -> Budget | None:
        if len(self.keep) != depth:
            raise ZooError(f"per_block has {len(self.keep)} counts but the model {depth} blocks")
        keep = self.keep[block]
        prune = self.prune[block] if self.prune else None
        counts = [c - self.prefix for c in (keep, prune) if c is not None]
        if not counts or min(counts) >= n:
            return None
        return Budget(min(counts), None if prune is None else prune - self.prefix)


def default_schedule(r: float | Sequence[int] | None = None) -> Schedule | None:
    """`schedule.r=13` on a command line without choosing a schedule; None leaves the default."""
    return None if r is None else ConstantR(r)


def create_schedule(spec: Mapping[str, Any] | Schedule | None) -> Schedule | None:
    """Build a schedule from a mapping `{"name": ..., **args}`, or pass an instance on.

    Raises:
        UnknownName: With the nearest names.
        ZooError: If an argument is unknown or has a bad value.
    """
    if spec is None or isinstance(spec, Schedule):
        return spec
    if not isinstance(spec, Mapping) or "name" not in spec:
        raise ZooError(
            "expected a schedule instance or a mapping like {'name': 'constant_r', 'r': 13}, "
            f"got {spec!r}"
        )
    args = {str(k): v for k, v in spec.items()}
    name = args.pop("name")
    if name not in _SCHEDULES:
        list_schedules()
    if name not in _SCHEDULES:
        raise UnknownName("schedule", name, _SCHEDULES)
    try:
        return _SCHEDULES[name](**args)
    except TypeError as error:
        text = str(error).split("__init__() ")[-1]
        raise ZooError(f"schedule {name!r}: {text}") from error


def list_schedules() -> list[str]:
    """Registry names of all schedules, sorted; methods may bring their own."""
    from reduction.registry import list_methods

    list_methods()
    return sorted(_SCHEDULES)


def _counts(what: str, values: Sequence[int | None], prefix: int) -> list[int | None]:
    for value in values:
        if value is None:
            continue
        if isinstance(value, bool) or value != int(value) or value - prefix < 1:
            raise ZooError(
                f"{what} must hold integers of at least {prefix + 1}, got {value!r} in {values!r}"
            )
    return [None if v is None else int(v) for v in values]


def _read_counts(file: str) -> tuple[list[int], list[int] | None, int]:
    try:
        data = json.loads(Path(file).read_text())
        return data["keep"], data.get("prune"), int(data.get("prefix", 0))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ZooError(
            f"cannot read a schedule from {file!r}: expected JSON like {{'keep': [...]}} ({error})"
        ) from error
