"""PoWER-BERT's search for token counts, for any method that keeps a fixed number of tokens."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from reduction.errors import UnreachableBudget
from reduction.methods.power_bert import SoftExtract
from reduction.mixins.adaptive import Adaptive
from reduction.registry import create_schedule
from reduction.schedules.base import Schedule
from reduction.schedules.keep_rate import KeepRate
from reduction.schedules.per_block import PerBlock
from reduction.schedules.target import TargetGmacs
from zoo.cost.analytic import gmacs
from zoo.cost.profile import profile
from zoo.errors import ZooError
from zoo.lit.classifier import Classifier
from zoo.model.reduced import ReducedViT

if TYPE_CHECKING:
    from collections.abc import Sequence


class PowerBertSearch(Classifier):
    """Find how many tokens each block should keep, then train on with real removal.

    For the first part of the epochs the model trains with `SoftExtract` and the penalty
    `penalty * sum_l l * |retention_l|_1` (l from 1: later blocks pay more). Block l then keeps
    `floor(sum_p retention_l[p])` tokens, at least one and no more than the block before, and the
    model's own reducer takes over with these counts.

    With `schedule=target_gmacs` the search decides how the cost is shared out and the target how
    high it is: all shares of tokens `K_l / N` are raised to one power that meets it.

    Validation, test and checkpoints always use the counts of the moment with the model's own
    reducer.

    Args:
        net: A model with a reducer without learned parts.
        share: Part of the epochs spent on the search.
        rate: Learning rate of the factors.
        penalty: Weight lambda of the penalty.
        **options: See `Classifier`.

    Raises:
        ZooError: If the model has no reducer, or one that cannot change its counts, or plugins; or
            an argument is out of range.

    References:
        Goyal et al., PoWER-BERT, ICML 2020, arXiv 2001.08950; official code
        github.com/IBM/PoWER-BERT (Apache-2.0; written from a description of it). Token Pooling
        found its counts with this procedure.
    """

    logs = ("loss", "ce")
    volatile = frozenset({"schedule"})

    def __init__(
        self,
        net: ReducedViT,
        share: float = 0.5,
        rate: float = 3e-3,
        penalty: float = 3e-3,
        **options: Any,
    ) -> None:
        _check(net, share, rate, penalty)
        patches = net.grid[0] * net.grid[1]
        retention = nn.Parameter(torch.ones(net.depth, patches))
        super().__init__(net, **options)
        self.share, self.rate, self.penalty = float(share), float(rate), float(penalty)
        self.retention = retention
        # In a tuple, so that the backbone they share is not registered twice.
        self._soft = (ReducedViT(net.backbone, SoftExtract(retention), KeepRate(1.0)),)
        self.make_optimizer = self._with_retention(self.make_optimizer)
        self._settled = False
        self._found = counts(retention)

    def _with_retention(self, make: Callable[..., Optimizer]) -> Callable[..., Optimizer]:
        @functools.wraps(make)
        def build(net: nn.Module, **options: Any) -> Optimizer:
            optimizer = make(net, **options)
            group = {"params": [self.retention], "lr": self.rate, "weight_decay": 0.0}
            optimizer.add_param_group(group)
            return optimizer

        return build

    # -- training ---------------------------------------------------------------------------------

    @property
    def search_epochs(self) -> int:
        """Epochs of the search; the others train with the counts found."""
        return max(1, round(self.share * (self.trainer.max_epochs or 1)))

    def on_train_epoch_start(self) -> None:
        """Fix the counts when the search is over."""
        if self.current_epoch >= self.search_epochs:
            self.follow()
            self._settled = True

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of one batch."""
        images, labels = self.mixed(batch)
        net = self.net if self._settled else self._soft[0]
        loss = self.loss(net(images), labels)
        # Distributed training wants a gradient for every parameter, also later.
        penalty = 0.0 if self._settled else self.penalty
        total = loss + penalty * self._weighted_sum().to(loss.dtype)
        size = len(images)
        self.log("train/ce", loss.detach(), on_epoch=True, batch_size=size)
        self.log("train/loss", total.detach(), on_epoch=True, prog_bar=True, batch_size=size)
        return total

    def _weighted_sum(self) -> Tensor:
        depth = torch.arange(1, len(self.retention) + 1, device=self.retention.device)
        return (self.retention.sum(1) * depth).sum()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Keep the factors between zero and one."""
        super().on_train_batch_end(outputs, batch, batch_idx)
        with torch.no_grad():
            self.retention.clamp_(0.0, 1.0)

    # -- the schedule follows the factors ---------------------------------------------------------

    def follow(self) -> None:
        """Give the model the counts of this moment as its schedule, until they are fixed."""
        if not self._settled:
            self._found = counts(self.retention)
            self.net.schedule = at_target(self.net, self._found, self.retention.shape[1])

    def on_validation_start(self) -> None:
        """Validate with real removal."""
        self.follow()

    def on_test_start(self) -> None:
        """Test with real removal."""
        self.follow()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the counts of this moment."""
        self.follow()
        super().on_save_checkpoint(checkpoint)
        checkpoint["searched"] = list(self._found)

    def on_load_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        """Go on with the counts that a resumed run had found."""
        if checkpoint.get("epoch", 0) >= self.search_epochs:
            recipe = checkpoint["hyper_parameters"]["recipe"]
            self.net.schedule = create_schedule(recipe["schedule"])
            self._found = list(checkpoint["searched"])
            self._settled = True

    def finish(self, folder: Path, write: bool) -> dict[str, Any]:
        """Write schedule.json."""
        self.follow()
        schedule = self.net.schedule
        assert isinstance(schedule, PerBlock)
        report = {
            "keep": schedule.keep,
            "prefix": 0,
            "searched": self._found,
            "backbone": self.net.recipe["backbone"]["name"],
            "gmacs": profile(self.net).gmacs,
        }
        path = folder / "schedule.json"
        if write:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(report, indent=2) + "\n")
            print(f"schedule: {path}")
        return {"notes": f"counts searched in the first {self.search_epochs} epochs"}


def counts(retention: Tensor) -> list[int]:
    """Tokens that each block keeps: the mass that its factors leave, never rising.

    Args:
        retention: `(depth, N)` in [0, 1].
    """
    least, out = retention.shape[1], []
    for mass in retention.detach().double().sum(1).tolist():
        least = min(least, max(1, math.floor(mass)))
        out.append(least)
    return out


def at_target(net: ReducedViT, keep: Sequence[int], patches: int) -> Schedule:
    """The counts as they are, or brought to the cost that the model was asked to have.

    Args:
        net: The model.
        keep: Tokens after each block.
        patches: Tokens at the start.

    Raises:
        UnreachableBudget: If every block keeps everything, or too much with any power.
    """
    if net.target is None:
        return PerBlock(keep, strict=False)
    assert isinstance(net.target, TargetGmacs)

    def cost(schedule: Schedule | None) -> float:
        return gmacs(net.anatomy, schedule, last_block=net.runtime.last_block).total

    dense = cost(None)
    target = net.target.gmacs if net.target.gmacs is not None else net.target.fraction * dense

    def make(strength: float) -> Schedule:
        power = strength / (1 - strength)
        return PerBlock([max(1, int(patches * (k / patches) ** power)) for k in keep], strict=False)

    low, high = 0.0, 1.0 - 1e-9
    if dense <= target:
        return make(low)
    if cost(make(high)) > target:
        raise UnreachableBudget(
            f"target of {target:.4g} GMACs cannot be met with counts shaped like {list(keep)}; "
            "raise module.penalty or module.rate, or search for more epochs"
        )
    for _ in range(40):
        middle = (low + high) / 2
        inside = cost(make(middle)) <= target
        low, high = (low, middle) if inside else (middle, high)
    return make(high)


def _check(net: ReducedViT, share: float, rate: float, penalty: float) -> None:
    reducer = net.reducer
    if reducer is None:
        raise ZooError("the search finds counts for a method; choose one, e.g. reducer=topk")
    if isinstance(reducer, Adaptive) or any(True for _ in reducer.parameters()):
        raise ZooError(
            f"reducer {reducer.name!r} cannot change its counts while it trains; search with "
            "another, e.g. reducer=topk, then type schedule=per_block schedule.file=.../"
            "schedule.json"
        )
    if net.target is not None and not isinstance(net.target, TargetGmacs):
        raise ZooError(
            f"the search aims at a cost, not at {net.target.name}; type schedule=target_gmacs"
        )
    if len(net.plugins):
        raise ZooError("the search runs without plugins; type plugin=none")
    if not 0 < share <= 1:
        raise ZooError(f"module.share must be in (0, 1], got {share!r}")
    if not rate > 0 or not penalty >= 0:
        raise ZooError(
            f"module.rate must be above 0 and module.penalty 0 or more, got {rate!r}, {penalty!r}"
        )
