"""Which blocks a plugin that works stage by stage goes by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from reduction.base import Card
from reduction.schedules.base import Schedule
from reduction.schedules.target import Target
from zoo.adapters.tower import tower_of
from zoo.errors import ZooError

CLCA_CARD = Card(
    title="Cross-Layer Cache Aggregation for Token Reduction in Ultra-Fine-Grained Image "
    "Recognition",
    authors="Rios et al.",
    venue="ICASSP",
    year=2025,
    arxiv="2501.00243",
    code="https://github.com/arkel23/CLCA",
    licence="MIT",
    kind="cache of summary tokens + head over layers",
    training="with the backbone",
)


def stage_blocks(
    plugin: str, blocks: Sequence[int] | None, schedule: Schedule | None, backbone: Any
) -> list[int]:
    """The reduction blocks R: after each of them the cache is recovered and a class token kept.

    Chosen by the first of: the plugin's own `blocks`; the `blocks` of the schedule; the blocks
    that the schedule singles out, which means reducing in at most half of all; the quarter points
    of the depth (3, 6, 9 of 12), as far as they are possible.

    Args:
        plugin: Name for messages.
        blocks: What the user chose, or None.
        schedule: Of the model, a `Target` not solved yet.
        backbone: The timm model.

    Raises:
        ZooError: If the blocks are not strictly increasing from 1 to the last but one.
    """
    tower = tower_of(backbone)
    depth = len(tower.blocks(backbone))
    if depth < 3:
        raise ZooError(f"plugin {plugin!r} needs at least 3 blocks, the model has {depth}")
    chosen = blocks if blocks is not None else getattr(schedule, "blocks", None)
    if chosen is None:
        rows, columns = tower.grid(backbone)
        chosen = _singled_out(schedule, depth, int(rows * columns))
    if chosen is None:
        quarters = {depth * q // 4 for q in (1, 2, 3)}
        return sorted(b for b in quarters if 1 <= b <= depth - 2)
    chosen = [int(b) for b in chosen]
    if not chosen or chosen != sorted(set(chosen)) or chosen[0] < 1 or chosen[-1] > depth - 2:
        raise ZooError(
            f"plugin {plugin!r}: reduction blocks must increase within 1..{depth - 2} of "
            f"{depth} blocks (before block 1 nothing is cached, and the last block comes by "
            f"itself), got {chosen}; choose other schedule.blocks, or give the plugin its own with "
            "plugin.blocks=[...]"
        )
    return chosen


def _singled_out(schedule: Schedule | None, depth: int, patches: int) -> list[int] | None:
    """Blocks in which a schedule acts, or None where it acts nearly everywhere or nowhere."""
    if schedule is None or isinstance(schedule, Target):
        return None
    acts = [b for b in range(depth) if schedule.budget(b, depth, patches, patches) is not None]
    return acts if 0 < 2 * len(acts) <= depth else None
