"""APT: large patches where an image is plain, small ones where it is not."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from reduction.assignment import Keep, Merge, apply
from reduction.base import Card, Reducer
from reduction.checks import listed, number
from reduction.counts import Dims, Spec, Step
from reduction.errors import ZooError
from reduction.functional.cells import (
    cell_grid,
    corners,
    entropies,
    grey,
    lowered,
    members,
)
from reduction.functional.thresholds import grouped
from reduction.mixins.adaptive import Adaptive
from reduction.mixins.entry import AtEmbedding, Embedding
from reduction.mixins.pixels import Pixels
from reduction.registry import register
from reduction.tokens import Tokens, take_rows


@register("apt")
class APT(Adaptive, Pixels, AtEmbedding, Reducer):
    """Adaptive Patch Transformer: patches of several sizes in one image.

    Before the first block, from coarse to fine, a square cell of 4^s patches becomes one token
    where the entropy of its grey values is below the threshold of its scale. Such a token is the
    patch embedding of the cell at `2^-s` of the resolution, and its position on the coarser grid;
    trained, also a linear map, zero at the start, of a convolution over the embeddings of its
    patches.

    Args:
        thresholds: Entropy in bits of each scale, the cells of two by two patches first.
        mean: What was subtracted from pixels, a number or one per channel; None is what the
            backbone publishes, or 0.5.
        std: What they were divided by, likewise.

    Raises:
        ZooError: If an argument is out of range.

    References:
        Choudhury et al., ICLR 2026, arXiv 2510.18091; official code github.com/rccchoudhury/apt (no
        licence; this implementation is written from a specification).
    """

    card = Card(
        title="Accelerating Vision Transformers with Adaptive Patch Sizes",
        authors="Choudhury et al.",
        venue="ICLR",
        year=2026,
        arxiv="2510.18091",
        code="https://github.com/rccchoudhury/apt",
        licence="none",
        kind="merge before block 0",
        training="backbone and a branch that is zero at the start",
        note="Untrained, a large patch is the same picture at lower resolution and no more.",
    )
    site = "input"
    family = "constant_r"
    every_block = True
    limited = False

    def __init__(
        self,
        thresholds: Sequence[float] = (5.5,),
        mean: float | Sequence[float] | None = None,
        std: float | Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.thresholds = [number("thresholds", v) for v in listed("thresholds", thresholds)]
        if not self.thresholds:
            raise ZooError("thresholds must hold at least one number, got []")
        self.normalised_by(mean, std)
        self.patch_attn: nn.Module | None = None
        self.zero_conv: nn.Module | None = None

    def setup(self, spec: Spec) -> None:
        """Build the branch of coarse tokens, unless one that fits is there."""
        super().setup(spec)
        if isinstance(self.zero_conv, nn.Linear) and self.zero_conv.in_features == spec.width:
            return
        self.patch_attn = nn.Conv2d(spec.width, spec.width, 2, stride=2)
        self.zero_conv = nn.Linear(spec.width, spec.width)
        nn.init.zeros_(self.zero_conv.weight)
        nn.init.zeros_(self.zero_conv.bias)

    def count(self, n: int, step: Step) -> int:
        """As many as there are: pixels decide."""
        return n

    def scales(self, grid: tuple[int, int]) -> list[int]:
        """Scales of which the grid holds a whole cell."""
        whole = range(1, len(self.thresholds) + 1)
        return [s for s in whole if min(cell_grid(grid, s))]

    @torch.no_grad()
    def layout(self, images: Tensor, grid: tuple[int, int]) -> Merge:
        """Which patches become one token: base patches first, then cells by scale, row by row."""
        values, n = grey(self.pixels(images)), grid[0] * grid[1]
        index = torch.arange(n, device=images.device).expand(images.shape[0], -1)
        head, scale = index, torch.zeros_like(index)
        for s in reversed(self.scales(grid)):
            cell = members(grid, s, images.device)
            plain = entropies(values, grid, s) < self.thresholds[s - 1]
            used = plain & (scale[:, cell[:, 0]] == 0)
            each = used.repeat_interleave(cell.shape[1], dim=1)
            place = cell.flatten().expand_as(each)
            first = cell[:, :1].expand_as(cell).flatten().expand_as(each)
            head = head.scatter(1, place, torch.where(each, first, head.gather(1, place)))
            scale = scale.scatter(1, place, torch.where(each, s, scale.gather(1, place)))
        live = torch.ones_like(index, dtype=torch.bool)
        return grouped(head, (index + n * scale).float(), live, None)

    def look(self, images: Tensor, grid: tuple[int, int], step: Step) -> Keep:
        """The patch that stands first in every token."""
        a = self.layout(images, grid)
        return Keep(a.leader, a.valid, a.slot)

    def enter(
        self, t: Tokens, images: Tensor, grid: tuple[int, int], step: Step, embedding: Embedding
    ) -> Tokens:
        a = self.layout(images, grid)
        assert a.slot is not None
        # Of base patches the usual tokens; in the first patch of every cell what it would be.
        features = t.patches
        scale = torch.zeros_like(a.slot).scatter_add(1, a.slot, torch.ones_like(a.slot))
        held = scale.gather(1, a.slot)
        leads = a.leader.gather(1, a.slot) == _index(a.slot)
        base = features - embedding.positions(grid).to(features.dtype)
        for s in self.scales(grid):
            place = corners(grid, s, images.device)
            coarse = cell_grid(grid, s)
            own = embedding.patches(lowered(images, grid, s)) + embedding.positions(coarse)
            own = (own + self._branch(base, grid, s)).to(features.dtype)
            used = ((held == 4**s) & leads)[:, place]
            where = place.expand(features.shape[0], -1)
            chosen = torch.where(used.unsqueeze(-1), own, take_rows(features, where))
            index = where.unsqueeze(-1).expand_as(chosen)
            features = features.scatter(1, index, chosen)
        # Of the features a mean would be taken, which nobody wants: one is enough to carry along.
        out = apply(t._replace(x=t.x[..., :1]), a)
        rows = take_rows(features, a.leader)
        return out._replace(x=torch.cat([t.x[:, : t.prefix], rows], dim=1))

    def _branch(self, base: Tensor, grid: tuple[int, int], scale: int) -> Tensor:
        """What the embeddings of its patches add to every cell, `(B, cells, C)`."""
        assert self.patch_attn is not None and self.zero_conv is not None
        rows, columns = (side << scale for side in cell_grid(grid, scale))
        x = base.transpose(1, 2).reshape(base.shape[0], -1, *grid)[:, :, :rows, :columns]
        for _ in range(scale):
            x = self.patch_attn(x)
        branch: Tensor = self.zero_conv(x.flatten(2).transpose(1, 2))
        return branch

    def macs(self, n: int, prefix: int, step: Step, dims: Dims) -> int:
        total, square = 0, dims.width**2
        for s in self.scales(step.grid):
            rows, columns = cell_grid(step.grid, s)
            convolutions = (4**s - 1) // 3 * 4 * square
            total += rows * columns * (dims.patch_macs + convolutions + square)
        return total


def _index(like: Tensor) -> Tensor:
    return torch.arange(like.shape[1], device=like.device).expand_as(like)
