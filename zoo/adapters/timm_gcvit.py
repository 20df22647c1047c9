"""timm's GC ViT, to compare with: it runs itself, and nothing can be reduced in it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from timm.models.gcvit import GlobalContextVit
from torch import Tensor, nn

from reduction.counts import BlockCost
from zoo.adapters.attention import linear_weights
from zoo.adapters.raster import RasterTower, layer_macs
from zoo.adapters.reasons import REASONS
from zoo.adapters.standalone import Macs, register_standalone
from zoo.adapters.tower import register_tower


class GCViTTower(RasterTower):
    """timm's `GlobalContextVit`: stages of windowed blocks on a raster that shrinks."""

    title = "timm GC ViT"

    def blocks(self, m: Any) -> Sequence[nn.Module]:
        """See `Tower`, as for all others."""
        return [block for stage in m.stages for block in stage.blocks]

    def grid(self, m: Any) -> tuple[int, int]:
        """See `Tower`."""
        rows, columns = m.stages[0].feat_size
        return int(rows), int(columns)

    def checkpointing(self, m: Any) -> bool:
        """See `Tower`."""
        return any(stage.grad_checkpointing for stage in m.stages)


class GCViT(NamedTuple):
    """What `Standalone` asks of one such model.

    Attributes:
        model: The model.
    """

    model: Any

    @property
    def standalone(self) -> str:
        """Why no reducer applies."""
        return (
            f"a GC ViT takes no reducer: {REASONS['gcvit']}; it is here to be compared with, so "
            "leave the reducer out, or choose a plain one: zoo list --models"
        )

    @property
    def method(self) -> str:
        """It does nothing to tokens that others do not."""
        return "none"

    def token_counts(self, grid: tuple[int, int]) -> list[tuple[int, int]]:
        """Cells of the raster of every block, which stages halve in both directions."""
        return [(n, n) for n, _ in self._counted(grid)]

    def macs(self, grid: tuple[int, int]) -> Macs:
        """Cost of one image: blocks from their weights, all around them by running it empty."""
        blocks = []
        for n, block in self._counted(grid):
            attn, window = block.attn, block.window_size[0] * block.window_size[1]
            width = attn.num_heads * attn.head_dim
            blocks.append(
                BlockCost(
                    *(n, n, n),
                    linear_weights(attn) * n,
                    2 * n * window * width,
                    linear_weights(block.mlp) * n,
                    0,
                )
            )
        size = (self.model.in_chans, *(GCViTTower.stride * n for n in grid))
        inside = re.compile(r"stages\.\d+\.blocks\.")
        around = [n for name, n in layer_macs(self.model, size).items() if not inside.match(name)]
        return Macs(sum(around), tuple(blocks))

    def budget(self) -> dict[str, Any]:
        """There is none."""
        return {"name": "none"}

    def settings(self) -> dict[str, Any]:
        """Nothing changes later."""
        return {}

    def training_logits(self, images: Tensor) -> tuple[Tensor, ...]:
        """Logits of its one head."""
        return (self.model(images),)

    def _counted(self, grid: tuple[int, int]) -> Iterator[tuple[int, Any]]:
        rows, columns = grid
        for i, stage in enumerate(self.model.stages):
            if i:
                rows, columns = rows // 2, columns // 2
            for block in stage.blocks:
                yield rows * columns, block


register_tower(GlobalContextVit, GCViTTower())
register_standalone(GlobalContextVit, GCViT)
