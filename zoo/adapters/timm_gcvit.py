"""timm's GC ViT, to compare with: it runs itself, and nothing can be reduced in it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from timm.models.gcvit import GlobalContextVit
from torch import Tensor, nn

from reduction.counts import BlockCost
from zoo.adapters.attention import linear_weights
from zoo.adapters.reasons import REASONS
from zoo.adapters.standalone import Macs, register_standalone
from zoo.adapters.timm_tower import TimmTower
from zoo.adapters.tower import register_tower
from zoo.errors import ZooError

#: Pixels that one cell of the first raster stands for.
_PATCH = 4


class GCViTTower(TimmTower):
    """timm's `GlobalContextVit`: stages of windowed blocks on a raster that shrinks."""

    title = "timm GC ViT"

    def blocks(self, m: Any) -> Sequence[nn.Module]:
        """See `Tower`, as for all others."""
        return [block for stage in m.stages for block in stage.blocks]

    def prefix(self, m: Any) -> int:
        """See `Tower`."""
        return 0

    def class_tokens(self, m: Any) -> int:
        """See `Tower`."""
        return 0

    def width(self, m: Any) -> int:
        """See `Tower`."""
        return int(m.num_features)

    def reads(self, m: Any) -> str:
        """See `Tower`."""
        return "patches"

    def grid(self, m: Any) -> tuple[int, int]:
        """See `Tower`."""
        rows, columns = m.stages[0].feat_size
        return int(rows), int(columns)

    def patch_size(self, m: Any) -> tuple[int, int]:
        """See `Tower`."""
        return _PATCH, _PATCH

    def grid_of(self, m: Any, images: Tensor) -> tuple[int, int]:
        """See `Tower`."""
        return images.shape[-2] // _PATCH, images.shape[-1] // _PATCH

    def input_size(self, m: Any) -> tuple[int, int, int]:
        """See `Tower`."""
        rows, columns = self.grid(m)
        return int(m.in_chans), _PATCH * rows, _PATCH * columns

    def check_images(self, m: Any, images: Tensor) -> None:
        """See `Tower`; windows are made for one size."""
        wanted = self.input_size(m)
        if images.dim() != 4 or images.shape[1:] != wanted:
            raise ZooError(
                f"expected images of shape (B, {', '.join(map(str, wanted))}), got "
                f"{tuple(images.shape)}; another size is given to the model: img_size=(H, W)"
            )

    def stem(self, m: Any) -> nn.Module:
        """See `Tower`."""
        return m.stem  # type: ignore[no-any-return]

    def checkpointing(self, m: Any) -> bool:
        """See `Tower`."""
        return any(stage.grad_checkpointing for stage in m.stages)

    def after_blocks(self, m: Any) -> tuple[str, ...]:
        """See `Tower`."""
        return ("head.",)


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
        return Macs(_around(self.model, grid), tuple(blocks))

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


def _around(model: Any, grid: tuple[int, int]) -> int:
    """Of all layers outside the blocks: stem, convolutions between stages, queries, head."""
    ghost = copy.deepcopy(model).to("meta").eval()
    inside = {layer for stage in ghost.stages for layer in stage.blocks.modules()}
    macs = []

    def note(layer: Any, _: Any, out: Tensor) -> None:
        macs.append(out.numel() * layer.weight[0].numel())

    for module in ghost.modules():
        module._forward_hooks.clear()  # nobody shall see the copy
        module._forward_pre_hooks.clear()
        if isinstance(module, nn.Conv2d | nn.Linear) and module not in inside:
            module.register_forward_hook(note)
    size = [_PATCH * n for n in grid]
    with torch.no_grad():
        ghost(torch.empty(1, model.in_chans, *size, device="meta"))
    return sum(macs)


register_tower(GlobalContextVit, GCViTTower())
register_standalone(GlobalContextVit, GCViT)
