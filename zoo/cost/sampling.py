"""What a method costs that keeps a different number of tokens in every image: measured on images.

The analytic count knows such a method's upper limit only. Here the tokens of every image are
counted while it runs, padding left out, and the same formula gives each image its cost.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from reduction.counts import BlockCost
from reduction.mixins.adaptive import Adaptive
from zoo.cost.analytic import block_cost, counted, head_macs
from zoo.cost.types import Profile, Sample, mean_of
from zoo.errors import ZooError
from zoo.model.answers import check_finite
from zoo.model.evaluating import evaluating
from zoo.model.plan import Plan

if TYPE_CHECKING:
    from zoo.model.reduced import ReducedViT
    from zoo.model.stream import Info

#: Images `(N, C, H, W)`, a mapping that the model takes in their place, or batches of either.
Images = Tensor | Mapping[str, Any] | Iterable[Tensor | Mapping[str, Any]]
NO_IMAGES = "expected at least one image to measure the cost on, got none"


def is_adaptive(model: Any) -> bool:
    """Whether the cost of a model depends on the image."""
    return isinstance(getattr(model, "reducer", None), Adaptive)


class CostSampler:
    """Adds up what images cost, from what the model says about its tokens.

    Args:
        model: A model whose reducer is adaptive.
    """

    def __init__(self, model: ReducedViT) -> None:
        self.model = model
        self.costs: list[int] = []
        self.limit: Profile | None = None
        self._plans: list[Plan] = []
        self._grid: tuple[int, int] | None = None
        self._sums: list[list[int]] = []
        self._heads = (0, 0)
        self._outside = 0  # of blocks and head
        self._known: dict[tuple[int, int, int], BlockCost] = {}

    def add(self, info: Info) -> None:
        """Count one batch.

        Args:
            info: Of a forward pass with `return_info="trace"` in evaluation mode.

        Raises:
            ZooError: If images of different sizes are mixed.
        """
        self.add_counts(info.grid, patch_counts(info).tolist())

    def add_counts(self, grid: tuple[int, int], images: Sequence[Sequence[int]]) -> None:
        """Count images by their numbers of tokens alone, e.g. those that another process has seen.

        Args:
            grid: Of their patches.
            images: Tokens of every image behind each block, see `patch_counts`.

        Raises:
            ZooError: If images of different sizes are mixed.
        """
        if self.limit is None:
            self._begin(grid)
        if grid != self._grid:
            raise ZooError(f"expected images of one size, got grids {self._grid} and {grid}")
        for counts in images:
            self._add_image(counts)

    def _begin(self, grid: tuple[int, int]) -> None:
        self._grid, self._plans = grid, self.model.plan(grid)
        self.limit = counted(
            self.model.anatomy,
            self.model.schedule,
            grid,
            last_block=self.model.runtime.last_block,
            params=sum(p.numel() for p in self.model.parameters()),
        )
        self._sums = [[0] * len(BlockCost._fields) for _ in self._plans]
        inside = (b.linear + b.attention + b.mlp + b.reducer for b in self.limit.blocks)
        self._outside = self.limit.macs - sum(inside) - sum(self._head(self._last))

    def _add_image(self, counts: Sequence[int]) -> None:
        prefix, n, total = self.model.prefix, self._plans[0].entering, self._outside
        if self._plans[0].entry is not None:
            # Nothing but plugins changes the number of tokens later.
            plugins = self.model.plugins
            n = counts[0] + prefix - sum(p.added(0, self.model.depth) for p in plugins)
        for i, after in enumerate(counts):
            block = self._block(i, n, after + prefix)
            n = after + prefix
            total += block.linear + block.attention + block.mlp + block.reducer
            for j, value in enumerate(block):
                self._sums[i][j] += value
        linear, attention = self._head(n)
        self._heads = (self._heads[0] + linear, self._heads[1] + attention)
        self.costs.append(total + linear + attention)

    def _head(self, tokens: int) -> tuple[int, int]:
        """Linear and attention products of pooling and classifier for so many tokens."""
        if any(plugin.replaces_head for plugin in self.model.plugins):
            return 0, 0
        return head_macs(self.model.backbone, tokens)

    def _block(self, i: int, entering: int, leaving: int) -> BlockCost:
        key = (i, entering, leaving)
        if key not in self._known:
            self._known[key] = block_cost(self.model.anatomy, i, self._plan(i, entering, leaving))
        return self._known[key]

    def _plan(self, i: int, entering: int, leaving: int) -> Plan:
        """The plan of a block with an image's own counts."""
        p, reducer = self._plans[i], self.model.reducer
        added = 0
        if self.model.plugins:
            added = sum(plugin.added(i, self.model.depth) for plugin in self.model.plugins)
        after = leaving - added
        if p.rows is not None:
            # The last block puts out its first rows alone, whatever has happened before them.
            early = p.step is not None and reducer is not None and reducer.site == "pre"
            return p._replace(entering=entering, attention=after if early else entering)
        if p.step is None or reducer is None:
            return p._replace(entering=entering, attention=entering, mlp=entering, leaving=leaving)
        keep = min(p.step.keep, max(1, entering - self.model.prefix - p.spared))
        return p._replace(
            entering=entering,
            attention=after if reducer.site == "pre" else entering,
            mlp=entering if reducer.site == "post" else after,
            leaving=leaving,
            step=p.step._replace(budget=p.step.budget._replace(keep=keep)),
        )

    @property
    def _last(self) -> int:
        """Tokens that leave the last block at most."""
        return self._plans[-1].leaving

    def profile(self) -> Profile:
        """The mean over the images counted so far, with the spread in `sample`.

        Raises:
            ZooError: If there are none.
        """
        if self.limit is None or not self.costs:
            raise ZooError(NO_IMAGES)
        n = len(self.costs)
        mean = sum(self.costs) / n
        blocks = [BlockCost(*(round(value / n) for value in sums)) for sums in self._sums]

        limit, head = self.limit, self._head(self._last)

        def shift(*names: str) -> float:
            """What the blocks cost on average beyond their limit, in GMACs (below zero)."""
            places = [BlockCost._fields.index(name) for name in names]
            found = sum(sums[j] for sums in self._sums for j in places) / n
            return float(found - sum(b[j] for b in limit.blocks for j in places)) / 1e9

        linear = limit.linear + shift("linear", "mlp") + (self._heads[0] / n - head[0]) / 1e9
        attention = limit.attention + shift("attention") + (self._heads[1] / n - head[1]) / 1e9
        return replace(
            self.limit,
            gmacs=mean / 1e9,
            macs=round(mean),
            linear=linear,
            attention=attention,
            reducer=self.limit.reducer + shift("reducer"),
            tokens=[(b.tokens_in, b.tokens_out) for b in blocks],
            blocks=blocks,
            sample=Sample(
                mean=mean / 1e9,
                min=min(self.costs) / 1e9,
                max=max(self.costs) / 1e9,
                images=n,
                limit=self.limit.gmacs,
            ),
        )


def patch_counts(info: Info) -> Tensor:
    """Tokens of every image behind each block, prefix and padding apart, `(B, L)`.

    An image that has lost all of them still costs one row, as it does when it runs alone.
    """
    counts = []
    for t in info.trace:
        if t.mask is None:
            counts.append(torch.full((t.x.shape[0],), t.n))
        else:
            counts.append(t.mask[:, t.prefix :].sum(1).cpu().clamp_min(1))
    return torch.stack(counts, dim=1)


def of_one_size(model: ReducedViT, images: Images) -> Iterator[Tensor]:
    """Batches `(B, C, H, W)` of one size each.

    Args:
        model: Whose tower says which sizes there are in a batch that is no tensor.
        images: `(N, C, H, W)`, taken in batches of 64; batches of them; or such mappings as the
            model itself takes in their place.
    """
    if isinstance(images, Tensor):
        yield from images.split(64)
        return
    for batch in (images,) if isinstance(images, Mapping) else images:
        if isinstance(batch, Tensor):
            yield batch
        else:
            yield from (p.images for p in model.tower.by_size(model.backbone, batch))


@torch.no_grad()
def sample(model: ReducedViT, images: Images) -> Profile:
    """Cost of an adaptive model on images, in evaluation mode.

    Args:
        model: The model.
        images: See `of_one_size`.

    Raises:
        NotFinite: If the model answers an image with NaN or infinity: such tokens are not counted.
        ZooError: If there are no images.
    """
    samplers: dict[tuple[int, int], CostSampler] = {}
    weight, seen = next(model.parameters()), 0
    with evaluating(model):
        for batch in of_one_size(model, images):
            if len(batch):
                logits, info = model(batch.to(weight.device, weight.dtype), return_info="trace")
                check_finite(logits, seen)
                seen += len(batch)
                samplers.setdefault(info.grid, CostSampler(model)).add(info)
    if not samplers:
        raise ZooError(NO_IMAGES)
    return mean_of([(s.profile(), len(s.costs)) for s in samplers.values()])
