"""Clocks: several candidates in turns in one process, and the memory that one call takes.

A machine is not equally fast from one minute to the next, so nothing is ever timed alone: all
candidates of a comparison take turns, forwards and backwards, and only medians of the same run are
compared.
"""

from __future__ import annotations

import ctypes
import gc
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from zoo.measure.throughput import clocked, take_turns

Step = Callable[[], object]


@dataclass
class Times:
    """Seconds per call of one candidate, one entry per round.

    Attributes:
        seconds: One entry per round.
        error: Why there are none.
        beside: What the model that it is compared with took shortly before and after, mean of
            both, one entry per round; empty if it was not run there.
        cpu: Seconds that all threads of the process computed per call, one entry per round.
    """

    seconds: list[float] = field(default_factory=list)
    error: str | None = None
    beside: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Median of the rounds."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Interquartile range over the median; above 0.1 the machine was busy."""
        if len(self.seconds) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return (high - low) / self.median

    @property
    def relative(self) -> list[float]:
        """Seconds in units of what ran beside it, if anything did."""
        if not self.beside:
            return self.seconds
        return [own / other for own, other in zip(self.seconds, self.beside, strict=True)]


def ratio(a: Times, b: Times) -> float:
    """How many times as long `a` takes as `b`: the median of the ratios of the rounds.

    Within a round both saw the same machine, which medians of each alone did not; all the more so
    where the same third model ran right beside both.
    """
    return statistics.median(x / y for x, y in zip(a.relative, b.relative, strict=True))


def in_turns(
    steps: Mapping[str, Step],
    device: torch.device,
    rounds: int = 9,
    warmup: int = 2,
    min_time: float = 0.1,
    beside: str | None = None,
) -> dict[str, Times]:
    """Time candidates in turns; each turn begins with a call that is not timed.

    Args:
        steps: What to call, by name.
        device: Where they run: decides on the clock.
        rounds: Turns of each.
        warmup: Calls before the first round, which allocate, compile and choose kernels.
        min_time: Seconds that a turn lasts at least.
        beside: One of the candidates that also runs before and after every two of the others,
            because a machine shared with others changes its speed within seconds.

    Returns:
        The times by name; of a candidate that failed, its error.
    """
    found = {name: Times() for name in steps}
    numbers = {}
    for name, step in steps.items():
        try:
            for _ in range(warmup):
                step()
            once = clocked(step, 1, device).wall
            numbers[name] = max(1, min(50, round(min_time / max(once, 1e-9))))
        except Exception as error:  # a failure is a row, not the end of the run
            found[name].error = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            if is_out_of_memory(error):
                raise
    others = [n for n in numbers if n != beside]
    if beside in numbers:
        pairs = [others[i : i + 2] for i in range(0, len(others), 2)]
        order = [beside, *(name for pair in pairs for name in (*pair, beside))]
    else:
        order = others
    clocks = take_turns(
        [steps[n] for n in order], [numbers[n] for n in order], rounds, device, untimed=1
    )
    turns = [[wall for wall, _ in one] for one in clocks]
    spent = [[cpu for _, cpu in one] for one in clocks]
    marks = [i for i, name in enumerate(order) if name == beside]
    for i, name in enumerate(order):
        if name == beside:
            continue
        found[name].seconds, found[name].cpu = turns[i], spent[i]
        if marks:
            before, after = max(m for m in marks if m < i), min(m for m in marks if m > i)
            around = zip(turns[before], turns[after], strict=True)
            found[name].beside = [(a + b) / 2 for a, b in around]
    if marks:
        together = zip(*(turns[i] for i in marks), strict=True)
        found[order[0]].seconds = [statistics.median(round_) for round_ in together]
        found[order[0]].beside = found[order[0]].seconds
        busy = zip(*(spent[i] for i in marks), strict=True)
        found[order[0]].cpu = [statistics.median(round_) for round_ in busy]
    return found


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory is short, in the words of either allocator."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def keep_pages() -> bool:
    """Tell glibc to keep the memory that is freed, as the allocators of servers do.

    By default it gives every large block back to the system and gets it again page by page, which
    hits whoever runs after a model of other sizes. Returns whether it could be told.
    """
    try:
        set_ = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_TOP_PAD of malloc.h
    return all([set_(-1, 2_000_000_000), set_(-3, 1_000_000_000), set_(-2, 1 << 28)])


def release(device: torch.device) -> None:
    """Give back what nobody holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def peak_memory(step: Step, device: torch.device) -> float:
    """Most MiB that one call holds on top of what was there before.

    On CUDA the allocator says it. On a CPU every allocation and release of torch's allocator is
    recorded by its profiler and added up; scratch memory inside libraries is not among them.
    """
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as run:
        step()
    events = [e for e in run.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak / 2**20
