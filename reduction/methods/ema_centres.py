"""Fixed centres that follow the data by a moving average: a clustering of ours without a loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from reduction.assignment import Merge, apply
from reduction.base import Card, Dims, Spec, Step
from reduction.errors import ZooError
from reduction.functional.clustering import fill_empty, least_of_cluster, no_autocast
from reduction.functional.matching import head_sum, unit
from reduction.functional.stages import StagedReducer
from reduction.registry import register
from reduction.tokens import Signals, Tokens

# A centre that gets less than this share of an even split is moved to where tokens are.
_DEAD = 0.05


class Centres(nn.Module):
    """The K centres of one stage: no parameters, only averages of the tokens they stand for.

    Attributes:
        total: Average sum of the unit vectors that chose each centre, `(K, d)`; its direction is
            the centre. Random at first.
        usage: Average number of tokens per batch that chose it, `(K,)`; zero at first.
    """

    total: Tensor
    usage: Tensor

    def __init__(self, outputs: int, width: int) -> None:
        super().__init__()
        self.register_buffer("total", 1e-3 * unit(torch.randn(outputs, width)))
        self.register_buffer("usage", torch.zeros(outputs))

    @property
    def outputs(self) -> int:
        """K."""
        return self.total.shape[0]

    @torch.no_grad()
    def observe(self, seen: Tensor, momentum: float) -> None:
        """Follow one batch.

        Args:
            seen: `(K, 2 d + 1)`: the sum of the tokens that chose each centre, how many they are,
                and a random token for each, to start anew from.
            momentum: Share of the past.
        """
        width = self.total.shape[1]
        seen = _over_processes(seen, width + 1)
        share = 1 - momentum
        total = momentum * self.total.float() + share * seen[:, :width]
        usage = momentum * self.usage.float() + share * seen[:, width]
        even = usage.mean()
        dead = usage < _DEAD * even
        fresh = unit(seen[:, width + 1 :]) * even
        self.total.copy_(torch.where(dead.unsqueeze(1), fresh, total))
        self.usage.copy_(torch.where(dead, even, usage))


def _over_processes(seen: Tensor, summed: int) -> Tensor:
    """Sum the first columns over all processes, and take the others from the first process."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return seen
    mine = seen.clone()
    if dist.get_rank() != 0:
        mine[:, summed:] = 0
    dist.all_reduce(mine)
    return mine


@register("ema_centres")
class EmaCentres(StagedReducer):
    """Assign tokens to fixed centres by one matrix product, and average each group. Ours.

    Every stage has as many centres as it keeps tokens. Between attention and MLP a token joins the
    centre with the largest cosine. A centre that no token of an image chooses takes the token that
    fits its own centre worst, of those that are not needed there: so every image has exactly K
    groups, and what is unusual in it stays alone. A group becomes its size-weighted mean.

    The centres are buffers, not parameters. In training mode they follow the tokens that chose them
    by a moving average (spherical K-Means over batches), and those that nobody chooses move to a
    random token. Otherwise they are fixed: nothing is clustered per image, shapes are static.
    New centres are random directions; `fit` finds better ones without training the model.

    Args:
        metric: What is compared: "key" (sum over heads) or "feature" (the residual stream).
        momentum: Share of the past in the moving average.
        prop_attn: Proportional attention.

    Raises:
        ZooError: If an argument is out of range.

    References:
        Ours. That centres may be buffers which follow the data is taken from CATANet (Liu et al.,
        CVPR 2025), which uses them to group tokens for super-resolution and removes none.
    """

    card = Card(
        title="Centres that follow by a moving average (ours)",
        authors="TokenZoo",
        venue="ours",
        year=2026,
        arxiv=None,
        code=None,
        licence=None,
        kind="cluster",
        training="centres, by a moving average (a fit pass without labels is enough)",
        note="Ours, not a published method. Fit the centres before use.",
    )
    site = "mid"
    family = "geometric"

    def __init__(
        self, metric: str = "feature", momentum: float = 0.95, prop_attn: bool = True
    ) -> None:
        super().__init__()
        if metric not in ("key", "feature"):
            raise ZooError(f"metric must be 'key' or 'feature', got {metric!r}")
        if isinstance(momentum, bool) or not 0 <= momentum < 1:
            raise ZooError(f"momentum must be in [0, 1), got {momentum!r}")
        self.metric = metric
        self.momentum = momentum
        self.prop_attn = prop_attn
        self.needs = frozenset({"k"}) if metric == "key" else frozenset()

    def build(self, spec: Spec, step: Step) -> nn.Module:
        return Centres(step.keep, spec.head_dim if self.metric == "key" else spec.width)

    def count(self, n: int, step: Step) -> int:
        """Centres of the stage; before they are built, what the schedule keeps."""
        if step.block in self._blocks:
            return min(n, self._centres(step).outputs)
        return min(n, step.keep)

    def _centres(self, step: Step) -> Centres:
        return cast(Centres, self.stage(step))

    def start(self, t: Tokens) -> Tokens:
        """In training, fix the centres for this pass: a block may be computed twice."""
        if not self.training:
            return t
        copies = {
            _key(block): cast(Centres, part).total.clone()
            for block, part in zip(self._blocks, self.stages, strict=True)
        }
        return t._replace(memory={**t.memory, **copies})

    def reduce(self, t: Tokens, s: Signals, step: Step) -> Tokens:
        centre = t.memory.get(_key(step.block), self._centres(step).total)
        z = self._metric(t, s)
        cosine = _cosine(z, centre)
        best, chosen = cosine.max(-1)
        out = apply(t, _groups(t, best, chosen, self.count(t.n, step)))
        if _key(step.block) not in t.memory:
            return out
        seen = _statistics(unit(z.float()), chosen, centre.shape[0])
        return out._replace(memory={**out.memory, f"{_key(step.block)}.seen": seen})

    def finish(self, t: Tokens) -> Tokens:
        """After the last block, which no recomputation reaches: move the centres."""
        memory = dict(t.memory)
        for block, part in zip(self._blocks, self.stages, strict=True):
            memory.pop(_key(block), None)
            seen = memory.pop(f"{_key(block)}.seen", None)
            if seen is not None:
                cast(Centres, part).observe(seen, self.momentum)
        return t._replace(memory=memory)

    @torch.no_grad()
    def fit(self, model: Callable[[Tensor], object], batches: Iterable[Tensor]) -> None:
        """Find centres from images alone, without labels and without changing the model.

        Args:
            model: What this reducer is part of; called on each batch.
            batches: Images `(B, 3, H, W)`, some tens of batches.
        """
        modules = list(model.modules()) if isinstance(model, nn.Module) else []
        modes = [(m, m.training) for m in [*modules, self]]
        try:
            for m, _ in modes:
                m.training = m is self
            for images in batches:
                model(images)
        finally:
            for m, mode in modes:
                m.training = mode

    @torch.no_grad()
    def _metric(self, t: Tokens, s: Signals) -> Tensor:
        if self.metric == "feature":
            return t.patches
        assert s.k is not None
        return head_sum(s.k[:, :, t.prefix :])

    def macs(self, n: int, prefix: int, step: Step, dims: Dims) -> int:
        width = dims.head_dim if self.metric == "key" else dims.width
        return n * self.count(n, step) * width


def _key(block: int) -> str:
    return f"centres{block}"


@torch.no_grad()
def _cosine(z: Tensor, centre: Tensor) -> Tensor:
    """Cosine of each token and centre `(B, N, K)`, K at most N, in float32 or better."""
    exact = torch.promote_types(z.dtype, torch.float32)
    with no_autocast(z):
        return unit(z.to(exact)) @ unit(centre[: z.shape[1]].to(exact)).T


@torch.no_grad()
def _groups(t: Tokens, best: Tensor, chosen: Tensor, k: int) -> Merge:
    gap = 1 - best
    slot = fill_empty(chosen, gap, t.patch_size.to(gap.dtype), k)
    leader = least_of_cluster(gap, slot, slot.new_zeros(slot.shape[0], k))
    return Merge(slot, leader)


@torch.no_grad()
def _statistics(z: Tensor, chosen: Tensor, k: int) -> Tensor:
    """What `Centres.observe` takes, of unit vectors `(B, N, d)`."""
    flat, index = z.reshape(-1, z.shape[2]), chosen.reshape(-1)
    total = flat.new_zeros(k, z.shape[2]).index_add(0, index, flat)
    usage = flat.new_zeros(k, 1).index_add(0, index, flat.new_ones(index.shape[0], 1))
    random = torch.randint(flat.shape[0], (k,), device=z.device)
    return torch.cat([total, usage, flat[random]], 1)
