"""Images per second, of a model and of its dense counterpart in turns.

The two take turns, round by round, because a machine is not equally fast from one minute to the
next: what one of them measures alone says little about the other. Medians of the rounds count.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from zoo.errors import ZooError
from zoo.measure.engines import Engine
from zoo.measure.progress import bar
from zoo.model.answers import check_finite


@dataclass(frozen=True)
class Throughput:
    """What `measure` found.

    Attributes:
        imgs_per_s: Images per second, the median of the rounds.
        ms: Milliseconds per batch, the median of the rounds.
        spread: Interquartile range of the rounds over their median; above 0.1 the machine was busy.
        batch: Batch size that fitted into memory.
        threads: CPU threads used.
        cpu_ms: Milliseconds that all threads of the process computed per batch, median likewise.
        imgs_per_s_dense: Images per second of the dense model; None where none was given.
        imgs_per_s_timm: Likewise of the model as its library has it.
        peak_mem_mb: Peak memory on the accelerator in MiB, of the model alone; None on a CPU.
        peak_mem_mb_dense: The same for the dense model.
    """

    imgs_per_s: float
    ms: float
    spread: float
    batch: int
    threads: int
    cpu_ms: float | None = None
    imgs_per_s_dense: float | None = None
    imgs_per_s_timm: float | None = None
    peak_mem_mb: float | None = None
    peak_mem_mb_dense: float | None = None


def measure(
    model: nn.Module,
    dense: nn.Module | None = None,
    *,
    input_size: Sequence[int] = (3, 224, 224),
    batch: int = 32,
    rounds: int = 10,
    min_time: float = 0.2,
    threads: int | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Throughput:
    """Measure inference on random images.

    Args:
        model: The model; compile it before, if so wished. It is put into evaluation mode.
        dense: Measured in turns with the model.
        input_size: `(channels, height, width)`.
        batch: Images per batch, halved until a batch fits into memory.
        rounds: Turns that each model takes.
        min_time: Seconds that a turn lasts at least.
        threads: CPU threads; None leaves torch's setting.
        device: Where to measure.
        dtype: Precision of autocast; float32 switches it off.

    Raises:
        NotFinite: A model answers random images with NaN or infinity.
        ZooError: A number is out of range, or not even one image fits into memory.
    """
    models = [m.eval().to(device) for m in (model, dense) if m is not None]
    engine = Engine("torch", torch.device(device), dtype)
    [found] = measure_each(
        {engine: models}, input_size=input_size, batch=batch, rounds=rounds, min_time=min_time,
        threads=threads, device=device,
    ).values()  # fmt: skip
    return found


def measure_each(
    candidates: Mapping[Engine, Sequence[nn.Module]],
    *,
    input_size: Sequence[int] = (3, 224, 224),
    batch: int = 32,
    rounds: int = 10,
    min_time: float = 0.2,
    threads: int | None = None,
    device: str | torch.device = "cpu",
) -> dict[Engine, Throughput]:
    """Measure models in several engines, all of them in turns in this process.

    Args:
        candidates: For each engine the model, its dense form, and the latter as its library has it;
            the last two may be left out, or be one. In evaluation mode, on the device.
        input_size: See `measure`.
        batch: See `measure`.
        rounds: See `measure`.
        min_time: See `measure`.
        threads: See `measure`.
        device: See `measure`.

    Raises:
        NotFinite: A model answers random images with NaN or infinity.
        ZooError: A number is out of range, a model cannot be run by an engine, or not even one
            image fits into memory.
    """
    for name, value in (("batch", batch), ("rounds", rounds), ("threads", threads or 1)):
        if int(value) != value or value < 1:
            raise ZooError(f"throughput.{name} must be a whole number from 1, got {value}")
    if not min_time > 0:
        raise ZooError(f"throughput.min_time must be above 0 seconds, got {min_time}")
    device = torch.device(device)
    # One that stands in two places runs once.
    places = list(dict.fromkeys((e, m) for e, models in candidates.items() for m in models))
    with _threads(threads), torch.inference_mode():
        starts = [engine.start(m) for engine, m in places]
        while True:
            images = torch.randn(batch, *input_size, device=device)
            try:
                steps = [start(images) for start in starts]
                for engine, models in candidates.items():
                    kinds = zip(("the model", "the dense model"), models, strict=False)
                    _check_answers({who: steps[places.index((engine, m))] for who, m in kinds})
                peaks = [_peak_memory(step, device) for step in steps]
                times = _rounds(steps, rounds, min_time, device)
                break
            except torch.OutOfMemoryError as error:
                if batch == 1:
                    raise ZooError(
                        f"not even one image fits into the memory of {device}"
                    ) from error
                batch //= 2
                del images, steps
                torch.cuda.empty_cache()
        used_threads = torch.get_num_threads()

    def summary(engine: Engine, models: Sequence[nn.Module]) -> Throughput:
        own, *others = [places.index((engine, m)) for m in models]
        walls = [[wall for wall, _ in times[i]] for i in (own, *others)]
        median = statistics.median(walls[0])
        quartiles = statistics.quantiles(walls[0], n=4) if len(walls[0]) > 1 else [median] * 3
        rates = [batch / statistics.median(wall) for wall in walls[1:]] + [None, None]
        return Throughput(
            imgs_per_s=batch / median,
            ms=1e3 * median,
            spread=(quartiles[2] - quartiles[0]) / median,
            batch=batch,
            threads=used_threads,
            cpu_ms=1e3 * statistics.median(cpu for _, cpu in times[own]),
            imgs_per_s_dense=rates[0],
            imgs_per_s_timm=rates[1],
            peak_mem_mb=peaks[own],
            peak_mem_mb_dense=peaks[others[0]] if others else None,
        )

    return {engine: summary(engine, models) for engine, models in candidates.items()}


def interleaved(
    models: Sequence[nn.Module],
    images: Tensor,
    rounds: int,
    threads: int | None = None,
    engine: Engine | None = None,
) -> tuple[list[list[float]], int]:
    """Time models in turns on the same images.

    Args:
        models: In evaluation mode, on the device of the images.
        images: One batch.
        rounds: Turns that each takes; their order alternates.
        threads: CPU threads; None leaves torch's setting.
        engine: What runs them; None is torch.

    Returns:
        Seconds per call, one list per model with one entry per round, and the threads used.

    Raises:
        NotFinite: A model answers an image with NaN or infinity.
        ZooError: A model cannot be run by the engine.
    """
    device = images.device
    engine = engine or Engine("torch", device)
    with _threads(threads), torch.inference_mode():
        steps = [engine.start(m)(images) for m in models]
        _check_answers(dict(zip(("the model", "the dense model"), steps, strict=False)))
        times = _rounds(steps, rounds, 0.0, device)
        return [[wall for wall, _ in one] for one in times], torch.get_num_threads()


def _check_answers(steps: Mapping[str, Callable[[], object]]) -> None:
    """Refuse models that are fast at nothing."""
    for who, step in steps.items():
        answers = step()
        if isinstance(answers, np.ndarray):
            answers = torch.from_numpy(answers)
        if isinstance(answers, Tensor):
            check_finite(answers, who=who, name=lambda _: "random numbers")


def _rounds(
    steps: Sequence[Callable[[], object]], rounds: int, min_time: float, device: torch.device
) -> list[list[Clocked]]:
    """Seconds per call: one list per step, one entry per round."""
    numbers = []
    for step in steps:
        clocked(step, 2, device)  # the first calls allocate, choose kernels, compile
        numbers.append(max(1, math.ceil(min_time / clocked(step, 1, device).wall)))
    return take_turns(steps, numbers, rounds, device)


def take_turns(
    steps: Sequence[Callable[[], object]],
    numbers: Sequence[int],
    rounds: int,
    device: torch.device,
    untimed: int = 0,
) -> list[list[Clocked]]:
    """Time warm candidates in turns, forwards and backwards.

    Args:
        steps: What to call.
        numbers: Calls per turn of each.
        rounds: Turns of each.
        device: Where they run: decides on the clock.
        untimed: Calls at the start of each turn that do not count, so that memory has the sizes of
            this model and not those of another one.

    Returns:
        Seconds per call: one list per step, one entry per round.
    """
    times: list[list[Clocked]] = [[] for _ in steps]
    turn = list(zip(steps, numbers, times, strict=True))
    for _ in bar(range(rounds), "throughput"):
        for step, number, found in turn:
            for _ in range(untimed):
                step()
            wall, cpu = clocked(step, number, device)
            found.append(Clocked(wall / number, cpu / number))
        turn.reverse()
    return times


class Clocked(NamedTuple):
    """What calls took.

    Attributes:
        wall: Seconds by events on CUDA, else by the clock on the wall.
        cpu: Seconds that all threads of the process computed meanwhile.
    """

    wall: float
    cpu: float


def clocked(step: Callable[[], object], number: int, device: torch.device) -> Clocked:
    """Seconds that so many calls take."""
    _synchronize(device)
    busy = time.process_time()
    if device.type == "cuda":
        event: Any = torch.cuda.Event  # which has no types
        begin, end = (event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(number):
            step()
        end.record()
        _synchronize(device)
        return Clocked(float(begin.elapsed_time(end)) / 1e3, time.process_time() - busy)
    start = time.perf_counter()
    for _ in range(number):
        step()
    _synchronize(device)
    return Clocked(time.perf_counter() - start, time.process_time() - busy)


def _peak_memory(step: Callable[[], object], device: torch.device) -> float | None:
    if device.type != "cuda":
        return None  # a process on a CPU has no such number that means anything
    step()
    torch.cuda.reset_peak_memory_stats(device)
    step()
    _synchronize(device)
    return torch.cuda.max_memory_allocated(device) / 2**20


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


@contextlib.contextmanager
def _threads(number: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if number is not None:
        torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
