"""Budgets in time: schedules found by measuring on this machine."""

from __future__ import annotations

import copy
import inspect
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from reduction.checks import one_of
from reduction.errors import UnreachableBudget, ZooError
from reduction.schedules.base import Schedule
from reduction.schedules.target import Target
from zoo.cost.analytic import block_costs
from zoo.measure.device import pick_device
from zoo.measure.engines import ENGINES, Engine
from zoo.measure.progress import counter
from zoo.measure.throughput import interleaved
from zoo.model.anatomy import Anatomy
from zoo.model.plan import make_plan
from zoo.model.reduced import ReducedViT

# Strengths of the family at which the cost model is fitted, beside the strongest.
_PROBES = (0.0, 0.1, 0.25, 0.5)
_CORRECTIONS = 4


class Measured(NamedTuple):
    """What was measured while a target in time was solved, one batch each.

    Attributes:
        ms: Milliseconds under the schedule that was found, median.
        ms_dense: Milliseconds of the dense model, measured in turns with it.
        relative: Median of the rounds' own ratios: a slow minute slows both.
        batch: Images per batch.
        threads: CPU threads.
        device: Where.
        engine: What ran both.
    """

    ms: float
    ms_dense: float
    relative: float
    batch: int
    threads: int
    device: str
    engine: str = "torch"

    def __str__(self) -> str:
        where = self.device if self.device != "cpu" else f"{self.threads} threads"
        where += "" if self.engine == "torch" else f" in {self.engine}"
        return (
            f"measured {self.ms:.2f} ms against {self.ms_dense:.2f} dense "
            f"({self.ms_dense / self.ms:.2f}x) at batch {self.batch} on {where}"
        )


class TargetTime(Target):
    """Base of the budgets in time.

    It is solved before a model is built: a few schedules of the family are timed in turns with the
    dense model, a cost model (a time per multiply-accumulate of linear layers, of attention and of
    the reducer, a time per block that reduces, and the rest) is fitted to them, the schedule is
    read off it, timed, and corrected by what was measured. Only the schedule that was found is
    saved with a model: loading it elsewhere measures nothing.

    Args:
        batch: Images per batch.
        rounds: Turns that each model takes; medians count.
        threads: CPU threads; None leaves torch's setting.
        device: "auto" is the accelerator if there is one.
        tolerance: Relative miss that needs no further correction.
        family: See `TargetGmacs`.
        blocks: See `TargetGmacs`.
        engine: What runs both models, see `zoo.measure.engines.ENGINES`; None is torch. Models are
            exported or compiled for every schedule that is tried.

    Raises:
        ZooError: If a number is out of range.
    """

    def __init__(
        self,
        batch: int = 1,
        rounds: int = 9,
        threads: int | None = None,
        device: str = "auto",
        tolerance: float = 0.03,
        family: str | None = None,
        blocks: Sequence[int] | None = None,
        engine: str | None = None,
    ) -> None:
        one_of("engine", engine or "torch", ENGINES)
        for name, value in (("batch", batch), ("rounds", rounds), ("threads", threads or 1)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ZooError(f"{self.name}.{name} must be a whole number from 1, got {value!r}")
        if (threads or 1) > 1024:
            raise ZooError(f"{self.name}.threads must be at most 1024, got {threads!r}")
        if not 0 < tolerance < 1:
            raise ZooError(f"{self.name}.tolerance must be in (0, 1), got {tolerance!r}")
        self.batch, self.rounds, self.threads = batch, rounds, threads
        self.device, self.tolerance, self.engine = device, tolerance, engine
        self._set_family(family, blocks)
        self.measured: Measured | None = None

    def config(self) -> dict[str, Any]:
        """Also the options, which subclasses pass on."""
        options = inspect.signature(TargetTime.__init__).parameters
        return {**super().config(), **{k: getattr(self, k) for k in options if k != "self"}}

    def limit(self, dense: float) -> float:
        """Milliseconds allowed, given those of the dense model."""
        raise NotImplementedError

    def wish(self) -> str:
        """The target in words."""
        raise NotImplementedError

    def solve(self, anatomy: Anatomy, last_block: str = "full") -> Schedule:
        """Find the schedule by measuring.

        Args:
            anatomy: The parts of the model that is to have it.
            last_block: See `zoo.model.runtime.Runtime`.

        Raises:
            UnreachableBudget: With what the strongest reduction reached.
        """
        assert anatomy.reducer is not None
        kind, make = self.members(anatomy.patches, anatomy.reducer.family)
        with counter(self.wish(), 1 + len(_PROBES) + _CORRECTIONS) as progress:
            clock = _Clock(anatomy, self, last_block, progress.update)
            return self._solve(anatomy.reducer.name, kind, make, clock)

    def _solve(
        self, name: str, kind: str, make: Callable[[float], Schedule], clock: _Clock
    ) -> Schedule:
        low = clock.time(make(1.0))
        if low.ms > self.limit(low.ms_dense) * (1 + self.tolerance):
            raise UnreachableBudget(
                f"{self.wish()} is below what {name!r} with family {kind!r} "
                f"reaches on this machine: {low}"
            )
        probes = [make(strength) for strength in _PROBES]
        samples = [(clock.features(s), clock.time(s).relative) for s in probes]
        samples.append((clock.features(make(1.0)), low.relative))
        predict = _fit(samples)
        factor, best, tried = 1.0, None, None
        for _ in range(_CORRECTIONS):
            allowed = self.limit(clock.dense) / clock.dense

            def fits(strength: float, factor: float = factor, allowed: float = allowed) -> bool:
                return factor * predict(clock.features(make(strength))) <= allowed

            schedule = make(_weakest(fits))
            found = clock.time(schedule)
            over = found.ms / self.limit(found.ms_dense)
            if best is None or _worse(best[0]) > _worse(over):
                best = (over, schedule, found)
            if abs(over - 1) <= self.tolerance or schedule == tried:
                break
            tried = schedule
            factor *= found.relative / (factor * predict(clock.features(schedule)))
        assert best is not None
        self.measured = best[2]
        return best[1]


class TargetMs(TargetTime):
    """The weakest reduction with which a batch takes at most so many milliseconds here.

    Args:
        ms: Milliseconds per batch.
        **options: See `TargetTime`.

    Raises:
        ZooError: If `ms` is not positive.
    """

    name = "target_ms"

    def __init__(self, ms: float, **options: Any) -> None:
        super().__init__(**options)
        if not ms > 0:
            raise ZooError(f"ms must be positive, got {ms!r}")
        self.ms = ms

    def limit(self, dense: float) -> float:
        """See `TargetTime`."""
        return self.ms

    def wish(self) -> str:
        """See `TargetTime`."""
        return f"target of {self.ms:g} ms"


class TargetSpeedup(TargetTime):
    """The weakest reduction that is so many times as fast as the dense model here.

    Args:
        speedup: Dense time over reduced time, 1 or more.
        **options: See `TargetTime`.

    Raises:
        ZooError: If `speedup` is below 1.
    """

    name = "target_speedup"

    def __init__(self, speedup: float = 2.0, **options: Any) -> None:
        super().__init__(**options)
        if not speedup >= 1:
            raise ZooError(f"speedup must be 1 or more, got {speedup!r}")
        self.speedup = speedup

    def limit(self, dense: float) -> float:
        """See `TargetTime`."""
        return dense / self.speedup

    def wish(self) -> str:
        """See `TargetTime`."""
        return f"target of {self.speedup:g}x"


class _Clock:
    """Times a model under schedules, in turns with its dense form, on shared weights."""

    def __init__(
        self,
        anatomy: Anatomy,
        target: TargetTime,
        last_block: str,
        timed: Callable[[], object],
    ) -> None:
        self.timed = timed
        self.anatomy, self.target, self.last_block = anatomy, target, last_block
        self.whole = sum(c.linear + c.mlp + c.attention for c in block_costs(anatomy, None))
        self.device = pick_device(target.device, "schedule.device")
        self.engine = Engine(
            target.engine or "torch", self.device, threads=target.threads, option="schedule.engine"
        )
        self.backbone = copy.deepcopy(anatomy.backbone).eval().to(self.device, target.dtype)
        self.plain = ReducedViT(self.backbone)
        self.dense = float("nan")

    def time(self, schedule: Schedule) -> Measured:
        """Milliseconds per batch under a schedule."""
        target = self.target
        reduced = ReducedViT(
            self.backbone,
            copy.deepcopy(self.anatomy.reducer),
            schedule,
            copy.deepcopy(list(self.anatomy.plugins)),
        ).eval()
        size = self.anatomy.tower.input_size(self.backbone)
        images = torch.randn(target.batch, *size, device=self.device)
        models = [reduced.to(self.device, target.dtype), self.plain]
        times, threads = interleaved(models, images, target.rounds, target.threads, self.engine)
        ratios = [a / b for a, b in zip(*times, strict=True)]
        found = Measured(
            1e3 * statistics.median(times[0]),
            1e3 * statistics.median(times[1]),
            statistics.median(ratios),
            target.batch,
            threads,
            str(self.device),
            self.engine.name,
        )
        self.timed()
        self.dense = found.ms_dense
        return found

    def features(self, schedule: Schedule) -> tuple[float, ...]:
        """What the time of a schedule is made of, each as a share of the dense model's cost."""
        costs, whole = block_costs(self.anatomy, schedule, self.last_block), self.whole
        plans = make_plan(self.anatomy, schedule, last_block=self.last_block)
        return (
            sum(c.linear + c.mlp for c in costs) / whole,
            sum(c.attention for c in costs) / whole,
            sum(c.reducer for c in costs) / whole,
            sum(p.step is not None for p in plans) / len(plans),
            1.0,
        )


def _fit(
    samples: Sequence[tuple[tuple[float, ...], float]],
) -> Callable[[tuple[float, ...]], float]:
    """Least squares with weights of at least zero, which five noisy points need."""
    rows = torch.tensor([f for f, _ in samples], dtype=torch.float64)
    goal = torch.tensor([ratio for _, ratio in samples], dtype=torch.float64)
    active = list(range(rows.shape[1]))
    while True:
        part = rows[:, active]
        # A touch of ridge: without it, columns that move together get opposite weights.
        gram = part.T @ part + 1e-6 * torch.eye(len(active), dtype=torch.float64)
        weights = torch.linalg.solve(gram, part.T @ goal)
        negative = [i for i, w in enumerate(weights.tolist()) if w < 0]
        if not negative:
            break
        active.pop(min(negative, key=lambda i: weights[i].item()))
    full = torch.zeros(rows.shape[1], dtype=torch.float64)
    full[active] = weights
    return lambda features: float(torch.tensor(features, dtype=torch.float64) @ full)


def _weakest(fits: Callable[[float], bool]) -> float:
    """The smallest strength in [0, 1] that fits, as far as the cost rises monotonely."""
    if fits(0.0):
        return 0.0
    low, high = 0.0, 1.0
    for _ in range(24):
        middle = (low + high) / 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def _worse(over: float) -> float:
    """Too slow counts more than too fast."""
    return 3 * (over - 1) if over > 1 else 1 - over
