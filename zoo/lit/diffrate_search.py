"""DiffRate's search for token counts: a frozen model, and logits that decide what it keeps."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from reduction.functional.diffrate_search import Cost, search_macs
from reduction.methods.diffrate import DiffRate
from reduction.schedules.per_block import PerBlock
from reduction.schedules.target import TargetGmacs
from zoo.cost.profile import profile
from zoo.errors import ZooError
from zoo.lit.classifier import Classifier

if TYPE_CHECKING:
    from reduction.functional.diffrate_search import RateProxies
    from zoo.cost.types import Profile
    from zoo.model.reduced import ReducedViT

# 1 GMAC in the paper's loss is this share of the model it was tuned on, DeiT-S.
_SHARE = 1 / 4.6


class DiffRateSearch(Classifier):
    """Find how many tokens each block prunes and merges, for a given cost.

    The loss is `CE + weight * ((GMACs - target) / unit)^2`, the cost being counted as the paper
    counts it. The backbone computes no weight gradients, and the blocks before the first masked
    token build no graph. Whenever the model is evaluated or saved it has the counts of that moment
    as its schedule, so the accuracy that is reported is of real removal.

    Logged beside what `Classifier` logs are `train/ce` and `train/gmacs`.

    Args:
        net: A model with reducer `diffrate` and a schedule `target_gmacs`; the target is in the
            paper's convention.
        weight: Factor lambda of the cost term.
        unit: GMACs that count as one in it. None is 1 as in the paper, and for models below 1 GMAC
            the share of the dense cost that 1 is for DeiT-S.
        granularity: Step between candidate counts.
        uncompressed: Blocks that never reduce; None is the first, and the last where the head
            averages over patches.
        warmup_epochs: Epochs without the cost term.
        **options: See `Classifier`.

    Raises:
        ZooError: If the model has another reducer or no target, or pools in another way.

    References:
        Chen et al., ICCV 2023, arXiv 2305.17997.
    """

    logs = ("loss", "ce", "gmacs")
    volatile = frozenset({"schedule"})

    def __init__(
        self,
        net: ReducedViT,
        weight: float = 5.0,
        unit: float | None = None,
        granularity: int = 1,
        uncompressed: Sequence[int] | None = None,
        warmup_epochs: int = 0,
        **options: Any,
    ) -> None:
        reducer = net.reducer
        if not isinstance(reducer, DiffRate):
            name = "none" if reducer is None else reducer.name
            raise ZooError(f"this search is DiffRate's; expected reducer=diffrate, got {name}")
        if not isinstance(net.target, TargetGmacs):
            raise ZooError(
                "the search needs a cost to aim at; type schedule=target_gmacs and "
                "schedule.gmacs=... or schedule.fraction=..."
            )
        pool = str(getattr(net.backbone, "global_pool", "token"))
        if pool not in ("token", "", "avg"):
            raise ZooError(
                f"the search knows heads on the class token or on the average, not {pool!r}"
            )
        if uncompressed is None:
            uncompressed = [0, net.depth - 1] if pool == "avg" else [0]
        rates = reducer.begin_search(
            net.grid[0] * net.grid[1], net.depth, granularity, uncompressed
        )
        net.schedule = reducer.searched_schedule(net.prefix)
        net.backbone.requires_grad_(False)
        super().__init__(net, **options)
        dense = profile(net, convention="diffrate").dense
        assert dense is not None  # a reduced model is always profiled beside the dense one
        asked = net.target.gmacs
        self.target = asked if asked is not None else net.target.fraction * dense
        self.weight, self.warmup_epochs = float(weight), int(warmup_epochs)
        self.unit = float(unit) if unit is not None else 1.0 if dense >= 1 else _SHARE * dense
        self.cost = cost_of(net)
        floor = self._gmacs(torch.ones(2, rates.depth, dtype=torch.float64)).item()
        if not floor < self.target <= dense * (1 + 1e-9):
            raise ZooError(
                f"target of {self.target:.4g} GMACs is out of reach: the model costs {dense:.4f} "
                f"as the paper counts, and at least {floor:.4f} however much is reduced"
            )

    @property
    def reducer(self) -> DiffRate:
        """The reducer under search."""
        return self.net.reducer  # type: ignore[return-value]

    @property
    def rates(self) -> RateProxies:
        """What is trained."""
        rates = self.reducer.rates
        assert rates is not None
        return rates

    def trainable(self) -> nn.Module:
        """The proxies alone."""
        return self.rates

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return cross-entropy and cost of one batch."""
        images, labels = self.mixed(batch)
        ce = self.loss(self.net(images), labels)
        gmacs = self._gmacs(self.rates().kept)
        weight = 0.0 if self.current_epoch < self.warmup_epochs else self.weight
        loss = ce + weight * ((gmacs - self.target) / self.unit).square().to(ce.dtype)
        values = {"train/loss": loss, "train/ce": ce, "train/gmacs": gmacs}
        for name, value in values.items():
            on_bar = name != "train/ce"
            value = value.detach().float()
            self.log(name, value, on_epoch=True, prog_bar=on_bar, batch_size=len(images))
        return loss

    def _gmacs(self, kept: Tensor) -> Tensor:
        return search_macs(kept, self.rates.patches, self.cost) / 1e9

    # -- the schedule follows the logits ----------------------------------------------------------

    def follow(self) -> None:
        """Give the model the counts of this moment as its schedule."""
        self.net.schedule = self.reducer.searched_schedule(self.net.prefix)

    def on_validation_start(self) -> None:
        """Validate what the search has found so far."""
        self.follow()

    def on_test_start(self) -> None:
        """Test what the search has found."""
        self.follow()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the counts beside the logits."""
        self.follow()
        super().on_save_checkpoint(checkpoint)

    def finish(self, folder: Path, write: bool) -> dict[str, Any]:
        """Write schedule.json and leave a model that removes tokens at the counts found."""
        self.follow()
        schedule = self.reducer.searched_schedule(self.net.prefix)
        found = profile(self.net, convention="diffrate")
        report = {
            "keep": schedule.keep,
            "prune": schedule.prune,
            "prefix": schedule.prefix,
            "backbone": self.net.recipe["backbone"]["name"],
            "gmacs": {"diffrate": found.gmacs, "zoo": profile(self.net).gmacs},
            "target": self.target,
        }
        path = folder / "schedule.json"
        if write:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(report, indent=2) + "\n")
            print(f"schedule: {path}")
        self.reducer.end_search()
        notes = f"counts searched, weights frozen; {found.gmacs:.4g} of {self.target:.4g} GMACs"
        return {"trained": False, "notes": f"{notes} as the paper counts"}


def cost_of(net: ReducedViT) -> Cost:
    """A model's cost as a function of its token counts, in the paper's convention."""
    patches = net.grid[0] * net.grid[1]
    dense, fewer = (_profile_at(net, n) for n in (patches, patches - 1))
    n = patches + net.prefix
    linear = tuple(b.linear / b.tokens_in for b in dense.blocks)
    pair = tuple(b.attention / b.tokens_in**2 for b in dense.blocks)
    # Some MLPs treat prefix tokens in their own way, so the slope takes two points.
    mlp = tuple(float(b.mlp - c.mlp) for b, c in zip(dense.blocks, fewer.blocks, strict=True))
    variable = sum(a * n + b * n * n + c * n for a, b, c in zip(linear, pair, mlp, strict=True))
    return Cost(round(dense.macs - variable), net.prefix, linear, pair, mlp)


def _profile_at(net: ReducedViT, patches: int) -> Profile:
    """Cost with so many reducible tokens from the first MLP on."""
    before = net.schedule
    net.schedule = PerBlock(keep=[patches] * net.depth)
    try:
        return profile(net, convention="diffrate")
    finally:
        net.schedule = before
