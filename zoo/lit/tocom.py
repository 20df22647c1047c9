"""Trains ToCom's adapters: at random merge rates, with the model at its own rate as teacher."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from reduction.schedules.base import Schedule
from reduction.schedules.constant_r import ConstantR
from zoo.errors import ZooError
from zoo.lit.classifier import Classifier
from zoo.plugins.tocom import ToCom

if TYPE_CHECKING:
    from zoo.model.reduced import ReducedViT


class TokenCompensation(Classifier):
    """Teach adapters to make up for any merge rate.

    Each batch draws a merge rate other than the one in the backbone's training. The student is the
    model at that rate with its adapters, the teacher the same model at its own rate, where the
    adapters do nothing. The loss is the mean over images and classes of
    `p_teacher (log p_teacher - log p_student)`; labels are not used. Everything but the adapters is
    frozen and in evaluation mode.

    Validation and test use the model's own schedule.

    Args:
        net: A model with a merging reducer and the plugin `tocom`.
        **options: See `Classifier`.

    Raises:
        ZooError: If one of the two is missing, or a target rate is fixed.

    References:
        Jie et al., ECCV 2024, arXiv 2408.06798.
    """

    def __init__(self, net: ReducedViT, **options: Any) -> None:
        found = [i for i, p in enumerate(net.plugins) if isinstance(p, ToCom)]
        if net.reducer is None or len(found) != 1:
            raise ZooError(
                "this training is ToCom's; expected a merging reducer and plugin=tocom, got "
                f"{getattr(net.reducer, 'name', None)} and {[p.name for p in net.plugins]}"
            )
        plugin = net.plugins[found[0]]
        if plugin.target is not None:
            raise ZooError("training draws the merge rate itself; type plugin.target=null")
        options["train_only"] = [f"plugins.{found[0]}.*"]
        super().__init__(net, **options)
        self._plugin = found[0]
        self.rates = [r for r in range(plugin.max_rate + 1) if r != plugin.source]

    def train(self, mode: bool = True) -> TokenCompensation:
        """Switch the adapters to training, and nothing else."""
        super().train(mode)
        self.net.eval()
        self.net.plugins[self._plugin].train(mode)
        return self

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the distillation loss of one batch at a merge rate drawn for it."""
        images, _ = self.mixed(batch)
        plugin: ToCom = self.net.plugins[self._plugin]
        drawn = self.rates[int(torch.randint(len(self.rates), ()))]
        with torch.no_grad():
            teacher = self._logits(images, plugin.source)
        student = self._logits(images, drawn)
        p, q = teacher.float().log_softmax(-1), student.float().log_softmax(-1)
        # Over classes too, as in the official code.
        loss = F.kl_div(q, p, reduction="batchmean", log_target=True) / p.shape[1]
        self.log("train/loss", loss.detach(), on_epoch=True, prog_bar=True, batch_size=len(images))
        return loss

    def _logits(self, images: Tensor, rate: float) -> Tensor:
        """Logits at a merge rate; where tokens run out less is merged."""
        before: Schedule | None = self.net.schedule
        self.net.schedule = ConstantR(rate, strict=False)
        try:
            return self.net(images)
        finally:
            self.net.schedule = before
