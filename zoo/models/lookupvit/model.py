"""The model: embedding, blocks, pooling, two heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from timm.layers import PatchEmbed
from timm.layers import trunc_normal_ as trunc_normal
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from zoo.adapters.standalone import Macs
from zoo.errors import ZooError
from zoo.models.lookupvit.layers import (
    LookupBlock,
    Norm,
    Streams,
    as_map,
    as_tokens,
    chosen_blocks,
    resize_grid,
)
from zoo.models.lookupvit.warm import checkpoint_filter_fn, resampled

# Loaders look for the filter in the module of the model's class.
__all__ = ["LookupViT", "Streams", "checkpoint_filter_fn"]

HEAD_MODES = ("avg", "compressed", "lookup")
STREAMS = ("lookup", "compressed", "both")
Grid = int | tuple[int, int]


class LookupViT(nn.Module):
    """A ViT with two token streams; the size of the small one is chosen at run time.

    The same weights run with every compressed grid from 1x1 up to the patch grid: as an argument
    of `forward`, or for all later calls with `set_compressed_grid`.

    Args:
        img_size: Height and width of the images.
        patch_size: Side of the patches.
        in_chans: Image channels.
        num_classes: Classes of both heads; 0 for features.
        global_pool: Only "avg".
        embed_dim: Width D.
        depth: Blocks.
        num_heads: Heads of every attention.
        mlp_ratio: Hidden width of the compressed tokens' MLP over D (the paper's p).
        lookup_mlp_ratio: Hidden width of the lookup tokens' MLP over D (the paper's 1/q).
        compressed_grid: Rows and columns of compressed tokens; None is 5x5, or the patch grid
            where that is smaller.
        head_mode: Whose logits answer: "avg" (mean of both heads), "compressed" or "lookup".
        norm_placement: Norms "post" or "pre" the projections of the cross attention.
        renormalise: Divide the infusion by the sums of its weights; for ablations.
        fc_norm: Final norms after the pooling instead of before.
        drop_rate: Dropout before the heads.
        pos_drop_rate: Dropout after the position embedding.
        proj_drop_rate: Dropout of the outputs in the blocks.
        attn_drop_rate: Dropout of attention weights.
        drop_path_rate: Stochastic depth of the last block; the others rise linearly to it.
        dynamic_img_size: Take images of other sizes, with the position table resampled.

    Raises:
        ZooError: An argument is out of range; the message says what to give.
    """

    standalone = (
        "LookupViT gathers its tokens into a compressed grid by itself and takes no reducer; its "
        "budget is that grid: compressed_grid=5 in Python, backbone.args.compressed_grid=5 on the "
        "command line"
    )
    method = "lookupvit"

    def __init__(
        self,
        img_size: Grid = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        lookup_mlp_ratio: float = 0.5,
        compressed_grid: Grid | None = None,
        head_mode: str = "avg",
        norm_placement: str = "post",
        renormalise: bool = False,
        fc_norm: bool = False,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        dynamic_img_size: bool = False,
    ) -> None:
        super().__init__()
        _check_pool(global_pool)
        self.num_classes, self.in_chans, self.global_pool = num_classes, in_chans, global_pool
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.num_prefix_tokens = 0
        self.grad_checkpointing = False
        self.dynamic_img_size = dynamic_img_size
        self.patch_embed = PatchEmbed(
            img_size,
            patch_size,
            in_chans,
            embed_dim,
            flatten=False,
            strict_img_size=not dynamic_img_size,
        )
        self.pos_embed = nn.Parameter(torch.zeros(1, embed_dim, *self.patch_embed.grid_size))
        self.pos_drop = nn.Dropout(pos_drop_rate)
        self.blocks = nn.ModuleList(
            LookupBlock(
                embed_dim,
                num_heads,
                mlp_ratio,
                lookup_mlp_ratio,
                norm_placement,
                renormalise,
                proj_drop_rate,
                attn_drop_rate,
                drop_path_rate * i / max(1, depth - 1),
            )
            for i in range(depth)
        )
        self.feature_info = [
            {"module": f"blocks.{i}", "num_chs": embed_dim, "reduction": patch_size}
            for i in range(depth)
        ]
        self.norm, self.norm_lookup = (
            nn.Identity() if fc_norm else Norm(embed_dim) for _ in range(2)
        )
        self.fc_norm, self.fc_norm_lookup = (
            Norm(embed_dim) if fc_norm else nn.Identity() for _ in range(2)
        )
        self.head_drop = nn.Dropout(drop_rate)
        self.head, self.head_lookup = self._heads(num_classes)
        self.set_head_mode(head_mode)
        if compressed_grid is None:
            rows, columns = self.patch_embed.grid_size
            compressed_grid = (min(5, rows), min(5, columns))
        self.set_compressed_grid(compressed_grid)
        self._init_weights()

    def _heads(self, num_classes: int) -> tuple[nn.Module, nn.Module]:
        """Classifiers of the compressed and of the lookup stream."""
        if num_classes <= 0:
            return nn.Identity(), nn.Identity()
        return nn.Linear(self.embed_dim, num_classes), nn.Linear(self.embed_dim, num_classes)

    @torch.no_grad()
    def _init_weights(self) -> None:
        trunc_normal(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    # ------------------------------------------------------------------ the compressed grid

    def set_compressed_grid(self, grid: Grid) -> None:
        """Choose the compressed grid of all later calls: one number, or rows and columns.

        Raises:
            ZooError: It is not between 1x1 and the patch grid.
        """
        self.compressed_grid = self._grid(grid, self.patch_embed.grid_size)

    def set_head_mode(self, mode: str) -> None:
        """Choose whose logits answer: "avg", "compressed" or "lookup".

        Raises:
            ZooError: It is none of them.
        """
        if mode not in HEAD_MODES:
            raise ZooError(f"head_mode must be one of {HEAD_MODES}, got {mode!r}")
        self.head_mode = mode

    def _grid(self, grid: Any, patches: tuple[int, int]) -> tuple[int, int]:
        rows, columns = (grid, grid) if isinstance(grid, int) else tuple(grid)
        if not (1 <= rows <= patches[0] and 1 <= columns <= patches[1]):
            raise ZooError(
                f"compressed_grid must be between 1x1 and the patch grid {patches[0]}x{patches[1]},"
                f" got {rows}x{columns}"
            )
        return int(rows), int(columns)

    # ------------------------------------------------------------------ running

    def _embed(
        self, images: Tensor, grid: Grid | None
    ) -> tuple[Streams, tuple[tuple[int, int], tuple[int, int]]]:
        """Both streams before the first block, and their grids."""
        x = self.patch_embed(images)
        patches = (x.shape[-2], x.shape[-1])
        pos: Tensor = self.pos_embed
        if self.dynamic_img_size:
            pos = resampled(pos, patches)
        x = self.pos_drop(x + pos)
        target = self._grid(self.compressed_grid if grid is None else grid, patches)
        # Resizing is linear: this equals the resized features plus the resized positions.
        compressed = resize_grid(x, target)
        return Streams(as_tokens(x), as_tokens(compressed)), (patches, target)

    def _block(self, i: int, streams: Streams, look: bool = True) -> Streams:
        block = self.blocks[i]
        if self.grad_checkpointing and torch.is_grad_enabled():
            return Streams(*checkpoint(block, *streams, look, use_reentrant=False))
        return Streams(*block(*streams, look))

    def _run(self, images: Tensor, grid: Grid | None, every_token: bool) -> Streams:
        streams, _ = self._embed(images, grid)
        last = len(self.blocks) - 1
        for i in range(len(self.blocks)):
            streams = self._block(i, streams, every_token or i < last)
        lookup = self.norm_lookup(streams.lookup) if every_token else streams.lookup
        return Streams(lookup, self.norm(streams.compressed))

    def forward_features(self, x: Tensor, compressed_grid: Grid | None = None) -> Streams:
        """Both streams after their final norms.

        Args:
            x: Images `(B, C, H, W)`.
            compressed_grid: For this call only.
        """
        return self._run(x, compressed_grid, every_token=True)

    def forward_head(self, x: Streams, pre_logits: bool = False) -> Tensor:
        """Pool and classify.

        Args:
            x: From `forward_features`.
            pre_logits: Stop before the classifiers.

        Returns:
            Logits `(B, classes)` of the head that `head_mode` names, or the mean of both; with
            `pre_logits` the pooled features `(B, D)` likewise.
        """
        found = self._answers(x, pre_logits)
        return found[0] if len(found) == 1 else (found[0] + found[1]) / 2

    def _answers(self, x: Streams, pre_logits: bool = False) -> tuple[Tensor, ...]:
        found = []
        if self.head_mode != "lookup":
            pooled = self.head_drop(self.fc_norm(x.compressed.mean(1)))
            found.append(pooled if pre_logits else self.head(pooled))
        if self.head_mode != "compressed":
            pooled = self.head_drop(self.fc_norm_lookup(x.lookup.mean(1)))
            found.append(pooled if pre_logits else self.head_lookup(pooled))
        return tuple(found)

    def forward(self, x: Tensor, compressed_grid: Grid | None = None) -> Tensor:
        """Classify images.

        Args:
            x: Images `(B, C, H, W)`.
            compressed_grid: For this call only; None is the one that was set.

        Returns:
            Logits `(B, classes)`.
        """
        return self.forward_head(self._run(x, compressed_grid, self.head_mode != "compressed"))

    def training_logits(self, images: Tensor) -> tuple[Tensor, ...]:
        """Logits of every head that answers, compressed first; each gets the loss in training."""
        return self._answers(self._run(images, None, self.head_mode != "compressed"))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        stream: str = "lookup",
        compressed_grid: Grid | None = None,
    ) -> Any:
        """Feature maps of chosen blocks.

        Args:
            x: Images `(B, C, H, W)`.
            indices: Blocks; an int takes the last so many, None takes all.
            return_prefix_tokens: timm's; there are none.
            norm: Apply the stream's final norm.
            stop_early: Do not run the blocks after the last that was chosen.
            output_fmt: "NCHW" for maps, "NLC" for tokens.
            intermediates_only: Leave out the final features.
            stream: "lookup" for maps on the patch grid, "compressed" for maps on the compressed
                grid, "both" for a `Streams` of the two.
            compressed_grid: For this call only.

        Returns:
            The maps, or `(Streams, maps)`.

        Raises:
            ZooError: `stream` or `output_fmt` is unknown.
        """
        if stream not in STREAMS:
            raise ZooError(f"stream must be one of {STREAMS}, got {stream!r}")
        if output_fmt not in ("NCHW", "NLC"):
            raise ZooError(f"output_fmt must be 'NCHW' or 'NLC', got {output_fmt!r}")
        wanted = chosen_blocks(indices, len(self.blocks))
        last = max(wanted)
        streams, grids = self._embed(x, compressed_grid)
        norms = (self.norm_lookup, self.norm)
        maps = []
        for i in range(last + 1 if stop_early else len(self.blocks)):
            streams = self._block(i, streams)
            if i in wanted:
                found = [n(t) if norm else t for n, t in zip(norms, streams, strict=True)]
                if output_fmt == "NCHW":
                    found = [as_map(t, g) for t, g in zip(found, grids, strict=True)]
                both = Streams(*found)
                maps.append(both if stream == "both" else getattr(both, stream))
        if intermediates_only:
            return maps
        return Streams(*(n(t) for n, t in zip(norms, streams, strict=True))), maps

    # ------------------------------------------------------------------ timm's contract

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what the chosen feature maps do not need; return the chosen blocks."""
        wanted = chosen_blocks(indices, len(self.blocks))
        last = max(wanted)
        self.blocks = self.blocks[: last + 1]
        if prune_norm:
            self.norm = self.norm_lookup = nn.Identity()
        if prune_head:
            self.fc_norm = self.fc_norm_lookup = nn.Identity()
            self.reset_classifier(0)
        return wanted

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Parameters that are not decayed."""
        return {"pos_embed"}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layer groups, for layer-wise learning rates."""
        return {
            "stem": r"^pos_embed|patch_embed",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade time for memory in training."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> tuple[nn.Module, nn.Module]:
        """Classifiers of the compressed and of the lookup stream."""
        return self.head, self.head_lookup

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace both classifiers.

        Raises:
            ZooError: `global_pool` is something else than "avg".
        """
        _check_pool(global_pool or "avg")
        self.num_classes = num_classes
        weight = self.pos_embed
        self.head, self.head_lookup = (
            h.to(weight.device, weight.dtype).train(self.training) for h in self._heads(num_classes)
        )

    # ------------------------------------------------------------------ the zoo's contract

    def token_counts(self, grid: tuple[int, int]) -> list[tuple[int, int]]:
        """Tokens of both streams entering and leaving each block."""
        rows, columns = self._grid(self.compressed_grid, grid)
        n = grid[0] * grid[1] + rows * columns
        return [(n, n)] * len(self.blocks)

    def macs(self, grid: tuple[int, int]) -> Macs:
        """Multiply-accumulates of one image; resizing is interpolation and not counted."""
        rows, columns = self._grid(self.compressed_grid, grid)
        n, last = grid[0] * grid[1], len(self.blocks) - 1
        all_tokens = self.head_mode != "compressed"
        blocks = [
            cast(Any, b).macs(n, rows * columns, all_tokens or i < last)
            for i, b in enumerate(self.blocks)
        ]
        heads = [self.head] * (self.head_mode != "lookup") + [self.head_lookup] * all_tokens
        linear = n * self.patch_embed.proj.weight.numel()
        linear += sum(h.weight.numel() for h in heads if isinstance(h, nn.Linear))
        return Macs(linear, tuple(blocks))

    def budget(self) -> dict[str, Any]:
        """What stands for a schedule in result rows."""
        return {"name": "grid", "grid": "{}x{}".format(*self.compressed_grid)}

    def settings(self) -> dict[str, Any]:
        """Constructor arguments that can change later, as they are now."""
        return {"compressed_grid": list(self.compressed_grid), "head_mode": self.head_mode}


def _check_pool(global_pool: str) -> None:
    if global_pool != "avg":
        raise ZooError(f"LookupViT averages its streams: global_pool='avg', got {global_pool!r}")
