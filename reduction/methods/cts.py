"""CTS: the superpatches that a policy picks share one token."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from reduction.assignment import Keep, Merge, apply
from reduction.base import Card, Reducer
from reduction.checks import one_of
from reduction.counts import Dims, Step
from reduction.errors import ZooError
from reduction.functional.cells import by_cell, cell_grid, grey, lowered, members
from reduction.functional.portable import stable_order
from reduction.mixins.entry import AtEmbedding, Embedding
from reduction.mixins.learned import Learned
from reduction.registry import register
from reduction.tokens import Tokens, take_rows

POLICIES = ("variance", "module")


@register("cts")
class CTS(Learned, AtEmbedding, Reducer):
    """Content-aware Token Sharing, its tokeniser.

    Before the first block, a fixed number of superpatches (two by two patches) become one token
    each: the patch embedding of the image at half the resolution, at the mean of the four
    positions. The others stay four patches. Which superpatches share is up to a policy that has
    seen the image.

    The paper's policy is a convolutional network that was trained to tell superpatches of a single
    class. It is not part of this library: `policy="module"` asks `reducer.policy`, a module from
    images to logits `(B, 2, rows / 2, columns / 2)`, of which the second class shares.

    Args:
        policy: "variance" (ours: superpatches whose grey values vary least share) or "module".

    Raises:
        ZooError: If the policy is unknown.

    References:
        Lu et al., CVPR 2023; official code github.com/tue-mps/cts-segmenter (no licence seen; this
        implementation is written from a specification).
    """

    card = Card(
        title="Content-aware Token Sharing for Efficient Semantic Segmentation with Vision "
        "Transformers",
        authors="Lu et al.",
        venue="CVPR",
        year=2023,
        arxiv=None,
        code="https://github.com/tue-mps/cts-segmenter",
        licence="not checked",
        kind="merge before block 0",
        training="policy network, and backbone",
        note="The tokeniser is reproduced; the paper's policy network is not here, and the default "
        "policy is ours.",
    )
    site = "input"
    family = "constant_r"

    def __init__(self, policy: str = "variance") -> None:
        super().__init__()
        self._policy = one_of("policy", policy, POLICIES)
        self.policy: nn.Module | None = None

    def arguments(self) -> dict[str, object]:
        """Constructor arguments; `policy` is also the name of a module."""
        return {**super().arguments(), "policy": self._policy}

    def max_drop(self, n: int) -> int:
        return n - (n + 3) // 4

    def shared(self, n: int, step: Step) -> int:
        """Superpatches that share, S: the fewest that leave no more than the schedule keeps."""
        rows, columns = cell_grid(step.grid, 1)
        return min(rows * columns, -((step.keep - n) // 3))

    def count(self, n: int, step: Step) -> int:
        return n - 3 * self.shared(n, step)

    @torch.no_grad()
    def score(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        """How much every superpatch may share, `(B, superpatches)`.

        Raises:
            ZooError: If a module is to say so and there is none.
        """
        if self._policy == "variance":
            # The offset and the scale of normalised pixels change no order.
            return -by_cell(grey(images.float()), grid, 1).var(dim=-1, unbiased=False)
        if self.policy is None:
            raise ZooError(
                "policy='module' needs a module in reducer.policy: images to logits "
                "(B, 2, rows / 2, columns / 2)"
            )
        logits: Tensor = self.policy(images)
        return logits.softmax(1)[:, 1].flatten(1)

    def layout(self, images: Tensor, grid: tuple[int, int], step: Step) -> Merge:
        """Patches that stay, row by row, then superpatches that share, row by row."""
        n, batch = grid[0] * grid[1], images.shape[0]
        count = self.shared(n, step)
        cell = members(grid, 1, images.device)
        best = stable_order(self.score(images, grid), descending=True)[:, :count]
        best = best.sort(dim=1).values
        taken = cell[best].flatten(1)
        gone = torch.zeros(batch, n, device=images.device).scatter(1, taken, 1.0)
        stay = stable_order(gone)[:, : n - 4 * count]
        leader = torch.cat([stay, cell[best][:, :, 0]], dim=1)
        place = torch.arange(n - 3 * count, device=images.device).expand(batch, -1)
        slot = torch.zeros(batch, n, dtype=torch.int64, device=images.device)
        slot = slot.scatter(1, stay, place[:, : n - 4 * count])
        shared = place[:, n - 4 * count :].repeat_interleave(4, dim=1)
        return Merge(slot.scatter(1, taken, shared), leader)

    def look(self, images: Tensor, grid: tuple[int, int], step: Step) -> Keep:
        """The patch that stands first in every token."""
        a = self.layout(images, grid, step)
        return Keep(a.leader, slot=a.slot)

    def enter(
        self, t: Tokens, images: Tensor, grid: tuple[int, int], step: Step, embedding: Embedding
    ) -> Tokens:
        a = self.layout(images, grid, step)
        count = self.shared(grid[0] * grid[1], step)
        # Of the features a mean would be taken, which nobody wants: one is enough to carry along.
        out = apply(t._replace(x=t.x[..., :1]), a)
        rows = [t.x[:, : t.prefix], take_rows(t.patches, a.leader[:, : t.n - 4 * count])]
        if count:
            cell = members(grid, 1, images.device)
            place = embedding.positions(grid)[:, cell].mean(2)
            own = (embedding.patches(lowered(images, grid, 1)) + place).to(t.x.dtype)
            # The superpatch that a patch is the first of, by the patch.
            where = torch.zeros(t.n, dtype=torch.int64, device=images.device)
            where = where.scatter(0, cell[:, 0], torch.arange(len(cell), device=images.device))
            rows.append(take_rows(own, where[a.leader[:, t.n - 4 * count :]]))
        return out._replace(x=torch.cat(rows, dim=1))

    def macs(self, n: int, prefix: int, step: Step, dims: Dims) -> int:
        # The image at half the resolution is embedded as a whole.
        rows, columns = cell_grid(step.grid, 1)
        return rows * columns * dims.patch_macs
