"""ToCom: small adapters that make up for a merge rate other than the one in training.

Shapes: B batch, N tokens, C width, H heads, d head width, U units of an adapter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from reduction.base import Card
from reduction.schedules.base import Schedule
from reduction.schedules.constant_r import ConstantR
from zoo.adapters.attention import parts_of
from zoo.adapters.blocks import block_adapter
from zoo.adapters.tower import tower_of
from zoo.errors import ZooError
from zoo.plugins.base import Plugin, register_plugin

CARD = Card(
    title="Token Compensator: Altering Inference Cost of Vision Transformer without Re-Tuning",
    authors="Jie et al.",
    venue="ECCV",
    year=2024,
    arxiv="2408.06798",
    code="https://github.com/JieShibo/ToCom",
    licence="none",
    kind="adapters",
    training="the adapters, with the model at its own merge rate as teacher",
)


class Adapter(nn.Module):
    """A linear map of low rank that starts at zero: `Up(Down(x))`, a few units at a time."""

    def __init__(self, width: int, units: int, outputs: int, dropout: float) -> None:
        super().__init__()
        self.down = nn.Linear(width, units, bias=False)
        self.up = nn.Linear(units, outputs, bias=False)
        self.dropout = dropout
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor, band: slice, factor: float) -> Tensor:
        """`(B, N, C)` to `(B, N, outputs)`, through the units of a band."""
        inner = F.dropout(F.linear(x, self.down.weight[band]), self.dropout, self.training)
        return F.linear(inner * factor, self.up.weight[:, band])


class Adapters(nn.Module):
    """Those of one block: for queries and for values."""

    def __init__(self, width: int, units: int, queries: int, values: int, dropout: float) -> None:
        super().__init__()
        self.q = Adapter(width, units, queries, dropout)
        self.v = Adapter(width, units, values, dropout)


@register_plugin("tocom")
class ToCom(Plugin):
    """Token Compensator: one set of adapters for every merge rate.

    A model trained at one merge rate r (0: without merging) loses accuracy at another. In every
    block ToCom adds to queries and values what a linear map of low rank makes of the attention's
    normalised input. Each unit step of r has `dim` units of its own; those between the two rates
    are switched on, with a plus where more is merged than in training and a minus where less is. At
    the rate of training nothing is added. Keys, which decide what is merged, are not touched.

    The adapters start at zero and are trained with everything else frozen, see
    `zoo.lit.tocom.TokenCompensation`. The rate in use is read from the schedule, so a saved model
    follows any `constant_r` schedule that it is loaded with.

    Args:
        source: Merge rate at which the backbone was trained.
        target: Merge rate in use; None: the schedule's r, or its mean where it differs by block.
        dim: Units for each step of r.
        max_rate: Largest merge rate that has units; beyond it nothing more is added.
        scale: Factor on what is added; the paper searches it on downstream tasks.
        dropout: Dropout rate between the two layers of an adapter, in training.

    Raises:
        ZooError: If an argument is out of range, or the schedule has no merge rate and `target` is
            not given.

    References:
        Jie et al., ECCV 2024, arXiv 2408.06798; official code github.com/JieShibo/ToCom (no licence
        file; this implementation is written from a specification, not from that code).
    """

    card = CARD
    page = "tocom"

    def __init__(
        self,
        source: float = 0,
        target: float | None = None,
        dim: int = 2,
        max_rate: int = 16,
        scale: float = 0.1,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        for name, rate in (("source", source), ("target", 0 if target is None else target)):
            if not 0 <= rate <= max_rate:
                raise ZooError(f"{name} must be a merge rate in [0, {max_rate}], got {rate!r}")
        if dim < 1 or max_rate < 1:
            raise ZooError(f"dim and max_rate must be 1 or more, got {dim!r} and {max_rate!r}")
        if not 0 <= dropout < 1:
            raise ZooError(f"dropout must be in [0, 1), got {dropout!r}")
        self.source = source
        self.target = target
        self.dim = dim
        self.max_rate = max_rate
        self.scale = scale
        self.dropout = dropout
        self.blocks = nn.ModuleList()

    def setup(self, backbone: Any, schedule: Schedule | None = None) -> None:
        """Create the adapters of every block."""
        units, like = self.dim * self.max_rate, next(backbone.parameters())
        fresh = []
        tower = tower_of(backbone)
        width = tower.width(backbone)
        for block in tower.blocks(backbone):
            attn = block_adapter(block).attn(block)
            parts = parts_of(attn)
            queries = parts.heads * parts.head_dim
            values = getattr(attn, "num_kv_heads", parts.heads) * parts.head_dim
            fresh.append(Adapters(width, units, queries, values, self.dropout))
        if [_shapes(m) for m in self.blocks] != [_shapes(m) for m in fresh]:
            self.blocks = nn.ModuleList(fresh).to(like.device, like.dtype)

    # ------------------------------------------------------------------ which units

    def rate(self, schedule: Schedule | None) -> float:
        """The merge rate in use.

        Raises:
            ZooError: If the schedule has none.
        """
        if self.target is not None:
            return self.target
        if schedule is None:
            return 0
        if not isinstance(schedule, ConstantR):
            raise ZooError(
                "plugin 'tocom' reads the merge rate from a constant_r schedule, got "
                f"{schedule.name!r}; type plugin.target=R, what a block merges on average"
            )
        r = schedule.r
        return sum(r) / len(r) if isinstance(r, list) else r

    def band(self, schedule: Schedule | None) -> tuple[slice, int]:
        """Units that are switched on, and their sign; an empty slice where the rates agree."""
        units = self.dim * self.max_rate
        source, target = (
            min(round(self.dim * rate), units) for rate in (self.source, self.rate(schedule))
        )
        low, high = sorted((source, target))
        # A rate stands for the last units.
        return slice(units - high, units - low), 1 if target >= source else -1

    def shift(
        self, block: int, schedule: Schedule | None
    ) -> Callable[[Tensor], tuple[Tensor, Tensor]] | None:
        """What the adapters of a block add to queries and values."""
        band, sign = self.band(schedule)
        if band.start == band.stop:
            return None
        adapters: Any = self.blocks[block]
        factor = sign * self.scale
        return lambda x: (adapters.q(x, band, factor), adapters.v(x, band, factor))

    def block_macs(self, block: int, tokens: int, schedule: Schedule | None) -> int:
        """Two layers for queries and two for values, on the units in use."""
        band, _ = self.band(schedule)
        own: Any = self.blocks[block]
        sides: int = sum(a.down.in_features + a.up.out_features for a in (own.q, own.v))
        return tokens * (band.stop - band.start) * sides


def _shapes(module: nn.Module) -> list[tuple[int, ...]]:
    return [tuple(p.shape) for p in module.parameters()]
