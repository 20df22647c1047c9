"""Which lengths of a sequence the attention kernel of this machine likes."""

from __future__ import annotations

import copy
import functools
import statistics
import time
from typing import Any

import torch
import torch.nn.functional as F

from reduction.functional.kernels import deterministic
from reduction.schedules.base import Schedule
from zoo.errors import ZooError
from zoo.model.anatomy import Anatomy

CANDIDATES = (16, 32)
#: A kernel has to be this much faster per pair of tokens before counts are rounded for it.
WORTH = 0.95
_ROUNDS = 9


def resolved(schedule: Schedule, anatomy: Anatomy) -> Schedule:
    """A schedule with what was measured in place of `align="auto"`.

    Args:
        schedule: A schedule or a target.
        anatomy: The parts of the model that is to have it.

    Raises:
        ZooError: If kernels are to be chosen without a clock.
    """
    if deterministic():
        raise ZooError(
            "deterministic=true goes without a clock, and align=auto is measured with one; type "
            "schedule.align=16, or deterministic=false"
        )
    weight = next(anatomy.backbone.parameters())
    dims = anatomy.dims(0)
    n = anatomy.patches + anatomy.prefix
    chosen = copy.copy(schedule)
    chosen.align = best(n, dims.heads, dims.head_dim, schedule.dtype or weight.dtype, weight.device)
    return chosen


@functools.cache
def best(n: int, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> int:
    """1, or the multiple at which fused attention is fastest per pair of tokens.

    Lengths between 40 and 90 % of `n` are timed in turns: multiples of 16 and of 32, and ones that
    are neither.

    Args:
        n: Tokens of the dense model.
        heads: H.
        head_dim: d.
        dtype: Of queries, keys and values.
        device: Where they are.
    """
    if device.type == "meta":
        return 1
    base = [n * share // 320 * 32 or 32 for share in (4, 6, 8)]
    lengths = {1: [b + 13 for b in base], 16: [b + 16 for b in base], 32: list(base)}
    spent: dict[int, list[float]] = {align: [] for align in lengths}
    # Not drawn: a measurement must not move the random numbers of the run around it.
    given = {
        length: [
            torch.linspace(-1, 1, heads * length * head_dim, device=device)
            .to(dtype)
            .view(1, heads, length, head_dim)
        ]
        * 3
        for group in lengths.values()
        for length in group
    }
    with torch.no_grad():
        for turn in range(_ROUNDS + 1):
            for align, group in lengths.items():
                took = sum(_time(given[length], device) / length**2 for length in group)
                if turn:  # the first turn is for caches
                    spent[align].append(took)
    cost = {align: statistics.median(found) for align, found in spent.items()}
    fastest = min(CANDIDATES, key=lambda align: cost[align])
    return fastest if cost[fastest] < WORTH * cost[1] else 1


def _time(qkv: list[Any], device: torch.device) -> float:
    start = time.perf_counter()
    for _ in range(3):
        F.scaled_dot_product_attention(*qkv)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
