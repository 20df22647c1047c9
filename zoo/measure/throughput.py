"""Images per second, of a model and of its dense counterpart in turns.

The two take turns, round by round, because a machine is not equally fast from one minute to the
next: what one of them measures alone says little about the other. Medians of the rounds count.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zoo.errors import ZooError
from zoo.measure.device import like_weights
from zoo.measure.progress import bar
from zoo.model.answers import check_finite
from zoo.model.attached import as_tensors


@dataclass(frozen=True)
class Throughput:
    """What `measure` found.

    Attributes:
        imgs_per_s: Images per second, the median of the rounds.
        ms: Milliseconds per batch, the median of the rounds.
        spread: Interquartile range of the rounds over their median; above 0.1 the machine was busy.
        batch: Batch size that fitted into memory.
        threads: CPU threads used.
        imgs_per_s_dense: The same for the dense model; None where none was given.
        peak_mem_mb: Peak memory on the accelerator in MiB, of the model alone; None on a CPU.
        peak_mem_mb_dense: The same for the dense model.
    """

    imgs_per_s: float
    ms: float
    spread: float
    batch: int
    threads: int
    imgs_per_s_dense: float | None = None
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
    for name, value in (("batch", batch), ("rounds", rounds), ("threads", threads or 1)):
        if int(value) != value or value < 1:
            raise ZooError(f"throughput.{name} must be a whole number from 1, got {value}")
    if not min_time > 0:
        raise ZooError(f"throughput.min_time must be above 0 seconds, got {min_time}")
    device = torch.device(device)
    models = [as_tensors(m.eval().to(device)) for m in (model, dense) if m is not None]
    with _threads(threads), torch.inference_mode():
        while True:
            images = torch.randn(batch, *input_size, device=device)
            steps = [_step(m, like_weights(images, m, device), device, dtype) for m in models]
            try:
                _check_answers(steps)
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
    median = statistics.median(times[0])
    quartiles = statistics.quantiles(times[0], n=4) if len(times[0]) > 1 else [median] * 3
    return Throughput(
        imgs_per_s=batch / median,
        ms=1e3 * median,
        spread=(quartiles[2] - quartiles[0]) / median,
        batch=batch,
        threads=used_threads,
        imgs_per_s_dense=batch / statistics.median(times[1]) if dense is not None else None,
        peak_mem_mb=peaks[0],
        peak_mem_mb_dense=peaks[1] if dense is not None else None,
    )


def interleaved(
    models: Sequence[nn.Module], images: Tensor, rounds: int, threads: int | None = None
) -> tuple[list[list[float]], int]:
    """Time models in turns on the same images.

    Args:
        models: In evaluation mode, on the device of the images.
        images: One batch.
        rounds: Turns that each takes; their order alternates.
        threads: CPU threads; None leaves torch's setting.

    Returns:
        Seconds per call, one list per model with one entry per round, and the threads used.

    Raises:
        NotFinite: A model answers an image with NaN or infinity.
    """
    device = images.device
    with _threads(threads), torch.inference_mode():
        models = [as_tensors(m) for m in models]
        steps = [_step(m, like_weights(images, m, device), device, torch.float32) for m in models]
        _check_answers(steps)
        return _rounds(steps, rounds, 0.0, device), torch.get_num_threads()


def _step(
    model: nn.Module, images: Tensor, device: torch.device, dtype: torch.dtype
) -> Callable[[], object]:
    def step() -> object:
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            return model(images)

    return step


def _check_answers(steps: Sequence[Callable[[], object]]) -> None:
    """Refuse models that are fast at nothing: the first is the one measured, the second dense."""
    for step, who in zip(steps, ("the model", "the dense model"), strict=False):
        answers = step()
        if isinstance(answers, Tensor):
            check_finite(answers, who=who, name=lambda _: "random numbers")


def _rounds(
    steps: Sequence[Callable[[], object]], rounds: int, min_time: float, device: torch.device
) -> list[list[float]]:
    """Seconds per call: one list per step, one entry per round."""
    numbers = []
    for step in steps:
        seconds(step, 2, device)  # the first calls allocate, choose kernels, compile
        numbers.append(max(1, math.ceil(min_time / seconds(step, 1, device))))
    return take_turns(steps, numbers, rounds, device)


def take_turns(
    steps: Sequence[Callable[[], object]],
    numbers: Sequence[int],
    rounds: int,
    device: torch.device,
    untimed: int = 0,
) -> list[list[float]]:
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
    times: list[list[float]] = [[] for _ in steps]
    turn = list(zip(steps, numbers, times, strict=True))
    for _ in bar(range(rounds), "throughput"):
        for step, number, found in turn:
            for _ in range(untimed):
                step()
            found.append(seconds(step, number, device) / number)
        turn.reverse()
    return times


def seconds(step: Callable[[], object], number: int, device: torch.device) -> float:
    """Seconds that so many calls take: events on CUDA, else the clock on the wall."""
    _synchronize(device)
    if device.type == "cuda":
        event: Any = torch.cuda.Event  # which has no types
        begin, end = (event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(number):
            step()
        end.record()
        _synchronize(device)
        return float(begin.elapsed_time(end)) / 1e3
    start = time.perf_counter()
    for _ in range(number):
        step()
    _synchronize(device)
    return time.perf_counter() - start


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
