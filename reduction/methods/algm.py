"""ALGM: merge alike windows early, and alike tokens anywhere in the middle."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from reduction.assignment import Merge
from reduction.base import Card, Reducer
from reduction.checks import count, listed, number
from reduction.counts import Dims, Step
from reduction.errors import ZooError
from reduction.functional.joining import Partners, above, joined, partners
from reduction.functional.matching import split_sizes, unit
from reduction.functional.portable import stable_order
from reduction.functional.thresholds import NOBODY, grouped
from reduction.mixins.adaptive import Adaptive
from reduction.registry import register
from reduction.tokens import Signals, Tokens


@register("algm")
class ALGM(Adaptive, Reducer):
    """Adaptive Local-then-Global Merging.

    Between attention and MLP of two blocks. In the first, every window of the patch grid whose
    patches are alike (mean cosine of all pairs of at least the threshold) becomes one token. In the
    second, tokens alternate between two sets, and each of the first that resembles one of the
    second by at least `mean + std / layer` of these similarities joins it. Means are weighted by
    size; attention does not see the sizes.

    Args:
        layers: First and second block, counted from 1 as in the paper. A model with fewer blocks
            does without the second step.
        threshold: Of the windows. The paper has one for every model and data set, from training
            images.
        window: Rows and columns of a window. What is left at the border of a grid that it does not
            divide is no window (ours).

    Raises:
        ZooError: If an argument is out of range.

    References:
        Norouzi et al., CVPR 2024, arXiv 2406.09936; official code
        github.com/tue-mps/algm-segmenter (MIT, parts under ToMe's CC-BY-NC 4.0; this implementation
        is written from a specification).
    """

    card = Card(
        title="ALGM: Adaptive Local-then-Global Token Merging for Efficient Semantic Segmentation "
        "with Plain Vision Transformers",
        authors="Norouzi et al.",
        venue="CVPR",
        year=2024,
        arxiv="2406.09936",
        code="https://github.com/tue-mps/algm-segmenter",
        licence="MIT, parts CC-BY-NC 4.0",
        kind="merge",
        training="none (fine-tuning recommended)",
        note="Similarities decide, not the schedule: counts depend on the image and have no limit.",
    )
    site = "mid"
    no_thresholds = "it has a threshold of its own, one for all blocks; type reducer.threshold=0.9"
    family = "constant_r"
    every_block = True
    limited = False
    added_tokens = "spare"

    def __init__(
        self,
        layers: Sequence[int] = (1, 5),
        threshold: float = 0.88,
        window: Sequence[int] = (2, 2),
    ) -> None:
        super().__init__()
        two = "a list of two whole numbers"
        self.layers = [count("layers", v) for v in listed("layers", layers, two)]
        self.threshold = number("threshold", threshold)
        self.window = [count("window", v) for v in listed("window", window, two)]
        if len(self.layers) != 2 or self.layers[0] >= self.layers[1]:
            raise ZooError(f"layers must be two blocks, the first one first, got {layers!r}")
        if len(self.window) != 2 or self.window == [1, 1]:
            raise ZooError(f"window must be two sides, not both 1, got {window!r}")

    def acts(self, block: int, depth: int) -> bool:
        return block + 1 in self.layers

    def count(self, n: int, step: Step) -> int:
        """As many as there are: nothing is known before the images are."""
        return n

    @torch.no_grad()
    def assign(self, t: Tokens, s: Signals, step: Step) -> Merge:
        if step.block + 1 == self.layers[0]:
            return self._windows(t, step.grid)
        p = partners(t, t.patches.to(torch.promote_types(t.x.dtype, torch.float32)))
        merged = above(p, just_below(unlike(p, step.block + 1)).unsqueeze(1), None)
        return joined(t, p, merged, None)

    def _windows(self, t: Tokens, grid: tuple[int, int]) -> Merge:
        if t.n != grid[0] * grid[1] or t.mask is not None:
            raise ZooError(
                f"algm needs all {grid[0] * grid[1]} patches in their raster, got {t.n} tokens; "
                "switch patch dropout off"
            )
        members = windows(grid, (self.window[0], self.window[1]), t.x.device)
        index = torch.arange(t.n, device=t.x.device).expand(t.x.shape[0], -1)
        key = index.to(torch.float32) + members.shape[0]
        live = torch.ones_like(index, dtype=torch.bool)
        if not members.shape[0]:
            return grouped(index, key, live, None)
        alike = cohesion(t.patches, members)
        # Windows that merge come first, the most alike of them first.
        rank = stable_order(alike, descending=True).argsort(dim=1)
        join = alike >= self.threshold
        first = members[:, :1].expand_as(members).reshape(-1)
        place = members.reshape(-1)
        each = join.repeat_interleave(members.shape[1], dim=1)
        head = index.scatter(1, place.expand_as(each), torch.where(each, first, place))
        heads = members[:, 0].expand_as(rank)
        early = torch.where(join, rank.to(key.dtype), key.gather(1, heads))
        return grouped(head, key.scatter(1, heads, early), live, None)

    def macs(self, n: int, prefix: int, step: Step, dims: Dims) -> int:
        if step.block + 1 == self.layers[0]:
            return 0  # nothing but sums
        senders, receivers = split_sizes(n, prefix)
        return senders * receivers * dims.width


def windows(grid: tuple[int, int], window: tuple[int, int], device: torch.device) -> Tensor:
    """Patches of every whole window, row by row, `(W, k)`."""
    rows, columns = grid[0] // window[0], grid[1] // window[1]
    index = torch.arange(grid[0] * grid[1], device=device).view(grid)
    index = index[: rows * window[0], : columns * window[1]]
    index = index.reshape(rows, window[0], columns, window[1]).transpose(1, 2)
    return index.reshape(rows * columns, window[0] * window[1])


def cohesion(x: Tensor, members: Tensor) -> Tensor:
    """Mean cosine of all pairs of each window, `(B, W)`.

    Args:
        x: `(B, P, C)`.
        members: `(W, k)`.
    """
    u = unit(x.to(torch.promote_types(x.dtype, torch.float32)))[:, members]
    k = members.shape[1]
    total = u.sum(2).square().sum(-1) - u.square().sum((-1, -2))
    return total / (k * (k - 1))


def unlike(p: Partners, layer: int) -> Tensor:
    """Similarity that a pair of the second step must have, `(B,)`: `mean + std / layer`."""
    real = p.best > NOBODY
    number = real.sum(1)
    value = torch.where(real, p.best, 0.0)
    mean = value.sum(1) / number.clamp_min(1)
    spread = torch.where(real, p.best - mean.unsqueeze(1), 0.0).square().sum(1)
    return mean + (spread / (number - 1).clamp_min(1)).sqrt() / layer


def just_below(x: Tensor) -> Tensor:
    """The next smaller number, for a comparison that includes the number itself."""
    return torch.nextafter(x, torch.full_like(x, -torch.inf))
