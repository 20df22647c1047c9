"""DualToken-ViT as a model of timm, and what the zoo asks of a model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import LayerNorm2d, trunc_normal_
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from zoo.adapters.raster import RasterTower, layer_macs
from zoo.adapters.standalone import Macs
from zoo.adapters.tower import register_tower
from zoo.errors import ZooError
from zoo.models.dualtoken.layers import DualTokenBlock, MergePatches


class DualTokenViT(nn.Module):
    """A light hybrid in three stages; learned global tokens go through all blocks.

    Unofficial: widths, depths and heads are LightViT-T's, chosen by us.

    Args:
        img_size: Height and width of the images: the stride of the stem times a multiple of four.
        in_chans: Image channels.
        num_classes: Of the classifier; 0 for features.
        global_pool: Only "avg".
        dims: Widths of the stages.
        depths: Blocks of the stages.
        num_heads: Heads of the stages.
        mlp_ratios: Hidden widths of the stages' MLPs over their widths.
        stem_steps: Steps of two of the stem.
        drop_rate: Dropout before the classifier.

    Raises:
        ZooError: An argument is out of range.
    """

    standalone = (
        "DualToken-ViT (unofficial) needs its raster, for the convolutions in every block and to "
        "join neighbours between stages, and takes no reducer; it is here to be compared with"
    )
    method = "none"

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        dims: Sequence[int] = (64, 128, 256),
        depths: Sequence[int] = (2, 6, 6),
        num_heads: Sequence[int] = (2, 4, 8),
        mlp_ratios: Sequence[float] = (8.0, 4.0, 4.0),
        stem_steps: int = 3,
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        _check_pool(global_pool)
        if not len(dims) == len(depths) == len(num_heads) == len(mlp_ratios):
            raise ZooError("dims, depths, num_heads and mlp_ratios: expected one entry per stage")
        size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        self.stride, last = 2**stem_steps, 2 ** (len(dims) - 1)
        if any(n % (self.stride * last) for n in size):
            raise ZooError(
                f"img_size must be a multiple of {self.stride * last}, got {size[0]}x{size[1]}"
            )
        self.num_classes, self.in_chans, self.global_pool = num_classes, in_chans, global_pool
        self.num_features = self.head_hidden_size = self.embed_dim = dims[-1]
        self.grad_checkpointing = False
        self.raster = (size[0] // self.stride, size[1] // self.stride)
        self.globals = (self.raster[0] // last) * (self.raster[1] // last)
        self.stem = _stem(in_chans, dims[0], stem_steps)
        self.tokens = nn.Parameter(torch.zeros(1, self.globals, dims[0]))
        trunc_normal_(self.tokens, std=0.02)
        self.stages, self.merges, self.widen = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for i, dim in enumerate(dims):
            steps = len(dims) - 1 - i
            self.stages.append(
                nn.ModuleList(
                    DualTokenBlock(dim, num_heads[i], mlp_ratios[i], steps)
                    for _ in range(depths[i])
                )
            )
            if steps:
                self.merges.append(MergePatches(dim, dims[i + 1]))
                self.widen.append(nn.Linear(dim, dims[i + 1]))
        self.norm, self.head_drop = nn.LayerNorm(dims[-1]), nn.Dropout(drop_rate)
        self.head = self._classifier(num_classes)
        self.feature_info = [
            {"module": f"stages.{i}", "num_chs": dim, "reduction": self.stride * 2**i}
            for i, dim in enumerate(dims)
        ]

    def _classifier(self, classes: int) -> nn.Module:
        return nn.Linear(self.num_features, classes) if classes > 0 else nn.Identity()

    # ------------------------------------------------------------------ running

    def forward_features(self, x: Tensor) -> Tensor:
        """The last map after the final norm, as tokens `(B, N, C)`."""
        x = self.stem(x)
        tokens = self.tokens.expand(len(x), -1, -1)
        for i, stage in enumerate(self.stages):
            if i:
                x, tokens = self.merges[i - 1](x), self.widen[i - 1](tokens)
            assert isinstance(stage, nn.ModuleList)
            for block in stage:
                if self.grad_checkpointing and torch.is_grad_enabled():
                    x, tokens = checkpoint(block, x, tokens, use_reentrant=False)  # type: ignore[misc]
                else:
                    x, tokens = block(x, tokens)
        return self.norm(x.flatten(2).transpose(1, 2))  # type: ignore[no-any-return]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Average and classify what `forward_features` returned."""
        pooled = self.head_drop(x.mean(1))
        return pooled if pre_logits else self.head(pooled)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `(B, classes)` of images `(B, C, H, W)`."""
        return self.forward_head(self.forward_features(x))

    # ------------------------------------------------------------------ timm's contract

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Parameters that are not decayed."""
        return {"tokens"}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layer groups, for layer-wise learning rates."""
        return {"stem": r"^stem|^tokens", "blocks": [(r"^stages\.(\d+)", None), (r"^norm", (99,))]}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade time for memory in training."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The classifier."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier.

        Raises:
            ZooError: `global_pool` is something else than "avg".
        """
        _check_pool(global_pool or "avg")
        self.num_classes, like = num_classes, self.tokens
        self.head = self._classifier(num_classes).to(like.device, like.dtype)

    # ------------------------------------------------------------------ the zoo's contract

    def _maps(self, grid: tuple[int, int]) -> list[int]:
        """Local tokens of every block."""
        return [
            (grid[0] >> i) * (grid[1] >> i)
            for i, stage in enumerate(self.stages)
            for _ in range(len(stage))  # type: ignore[arg-type]
        ]

    def token_counts(self, grid: tuple[int, int]) -> list[tuple[int, int]]:
        """Local and global tokens of every block."""
        return [(n + self.globals, n + self.globals) for n in self._maps(grid)]

    def macs(self, grid: tuple[int, int]) -> Macs:
        """Multiply-accumulates of one image."""
        size = (self.in_chans, *(self.stride * n for n in grid))
        inside: dict[str, int] = {}
        around = 0
        for name, cost in layer_macs(self, size).items():
            if found := re.match(r"stages\.\d+\.\d+", name):
                inside[found[0]] = inside.get(found[0], 0) + cost
            else:
                around += cost
        blocks = [
            block.macs(n, self.globals, linear)
            for block, n, linear in zip(
                _blocks(self), self._maps(grid), inside.values(), strict=True
            )
        ]
        return Macs(around, tuple(blocks))

    def budget(self) -> dict[str, Any]:
        """There is none."""
        return {"name": "none"}

    def settings(self) -> dict[str, Any]:
        """Nothing changes later."""
        return {}

    def training_logits(self, images: Tensor) -> tuple[Tensor, ...]:
        """Logits of its one head."""
        return (self(images),)


class DualTokenTower(RasterTower):
    """Ours."""

    title = "DualToken-ViT (unofficial)"

    def blocks(self, m: Any) -> Sequence[nn.Module]:
        """See `Tower`."""
        return _blocks(m)

    def grid(self, m: Any) -> tuple[int, int]:
        """See `Tower`."""
        return m.raster  # type: ignore[no-any-return]

    def patch_size(self, m: Any) -> tuple[int, int]:
        """See `Tower`."""
        return m.stride, m.stride

    def grid_of(self, m: Any, images: Tensor) -> tuple[int, int]:
        """See `Tower`."""
        return images.shape[-2] // m.stride, images.shape[-1] // m.stride

    def input_size(self, m: Any) -> tuple[int, int, int]:
        """See `Tower`."""
        return m.in_chans, m.stride * m.raster[0], m.stride * m.raster[1]


register_tower(DualTokenViT, DualTokenTower())


def _blocks(m: Any) -> list[DualTokenBlock]:
    return [block for stage in m.stages for block in stage]


def _stem(channels: int, dim: int, steps: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i in range(steps):
        out = dim >> (steps - 1 - i) or 1
        layers += [nn.Conv2d(channels, out, 3, stride=2, padding=1), LayerNorm2d(out), nn.GELU()]
        channels = out
    return nn.Sequential(*layers[:-1])


def _check_pool(global_pool: str) -> None:
    if global_pool != "avg":
        raise ZooError(f"DualToken-ViT averages its map: global_pool='avg', got {global_pool!r}")
