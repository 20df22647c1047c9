"""The Lightning module: one classifier for every model, reducer and recipe."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import MeanMetric, SumMetric
from torchmetrics.classification import MulticlassAccuracy

from reduction.mixins.learned import Learned
from reduction.mixins.training import Outcome, Trains
from zoo.data.loader import NO_IMAGE
from zoo.errors import ZooError
from zoo.lit import optim, schedules
from zoo.lit.callbacks import check_monitors
from zoo.lit.divergence import check_answers, check_step
from zoo.lit.relations import TokenRelations
from zoo.measure.device import like_weights

if TYPE_CHECKING:
    from zoo.model.reduced import ReducedViT


class Classifier(pl.LightningModule):
    """Train and evaluate an image classifier.

    Logged are `train/loss`, `train/loss_NAME` for each loss of the reducer, and for `val` and
    `test` the cross-entropy, top-1 and (with more than five classes) top-5 accuracy in percent.

    Args:
        net: The model; its keys in a checkpoint start with `net.`.
        optimizer: Builds an optimiser from the model; None is AdamW with its defaults.
        lr_schedule: Builds a scheduler from `(optimizer, total_steps=, steps_per_epoch=)`; None is
            a cosine.
        loss: Takes logits (B, K) and labels (B,) or soft labels (B, K); None is cross-entropy.
        teacher: Dense model of a loss that compares with one; None is the model itself with
            nothing reduced, as it is now.
        mixup: `{mixup_alpha, cutmix_alpha, prob, switch_prob}` of timm's Mixup, or None.
        aux_weight: Factor of the reducer's own losses.
        train_only: Patterns of the parameter names that are trained, e.g. `["reducer.*"]`; None is
            all. A backbone without any stays in evaluation mode, so that nothing is dropped in it.
        hyper_parameters: Plain containers to store in checkpoints beside the recipe.

    Raises:
        ZooError: something in `hyper_parameters` is not a plain container or value, or nothing is
            left to train.
    """

    net: ReducedViT
    #: What a training step logs, as `train/NAME`.
    logs: ClassVar[tuple[str, ...]] = ("loss",)
    #: Parts of the recipe that training itself changes: a resumed run may differ in them.
    volatile: ClassVar[frozenset[str]] = frozenset()

    def __init__(
        self,
        net: ReducedViT,
        optimizer: Callable[..., Optimizer] | None = None,
        lr_schedule: Callable[..., Any] | None = None,
        loss: nn.Module | None = None,
        teacher: ReducedViT | None = None,
        mixup: Mapping[str, Any] | None = None,
        aux_weight: float = 1.0,
        train_only: Sequence[str] | None = None,
        hyper_parameters: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.net = net
        if train_only is not None:
            _freeze_others(net, train_only)
        # A plugin's head replaces the model's; with parameters that get no gradient DDP stops.
        for name in getattr(net, "unused_parameters", set)():
            net.get_parameter(name).requires_grad_(False)
        self.make_optimizer = optimizer or optim.create_optimizer
        self.make_schedule = lr_schedule or schedules.cosine
        self.loss = loss or nn.CrossEntropyLoss()
        self.aux_weight = aux_weight
        classes = int(getattr(net, "num_classes"))  # noqa: B009  (nn.Module hides its type)
        if classes < 2:
            has = "no classifier" if classes == 0 else "a classifier of one class"
            raise ZooError(
                f"the model has {has}: there is nothing to tell apart; expected data, and with "
                "them a model, of two classes or more"
            )
        self.mix = _mixup(mixup, classes, self.loss)
        # Only a reducer with losses of its own asks for the state of every block.
        reducer = getattr(net, "reducer", None)
        self.has_aux = isinstance(reducer, Trains)
        # A list hides the teacher from the module: it is the starting point, not to be saved or
        # averaged or trained.
        self._teacher = [_dense_copy(net)] if getattr(reducer, "needs_teacher", False) else []
        self._related = self._relatives(teacher)
        #: Weights and images of validation and test are cast to this; training is not.
        self.evaluated_in: torch.dtype | None = None
        self._cast: list[ReducedViT] = []  # hidden from the module in a list, too
        for part in ("val", "test"):
            metrics: dict[str, nn.Module] = {
                "top1": MulticlassAccuracy(classes, top_k=1, average="micro"),
                "loss": MeanMetric(),
                "images": SumMetric(),
            }
            if classes > 5:
                metrics["top5"] = MulticlassAccuracy(classes, top_k=5, average="micro")
            setattr(self, f"{part}_metrics", nn.ModuleDict(metrics))
        # Lightning would pickle anything else, and then weights-only loading refuses the file.
        stored = _plain({**(hyper_parameters or {}), "recipe": getattr(net, "recipe", None)})
        self.save_hyperparameters(stored, logger=False)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, K) of images (B, C, H, W)."""
        return self.net(images)

    def train(self, mode: bool = True) -> Classifier:
        """Switch to training, except for a backbone that is not trained."""
        super().train(mode)
        backbone = getattr(self.net, "backbone", None)
        if backbone is not None and not any(p.requires_grad for p in backbone.parameters()):
            backbone.eval()
        return self

    # -- training ---------------------------------------------------------------------------------

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor | None:
        """Return the loss of one batch; None trains nothing."""
        images, labels = self.mixed(batch)
        extra: Mapping[str, Tensor] = {}
        related: Mapping[str, Tensor] = {}
        if self.has_aux or self._related:
            logits, info = self.net(images, return_info="trace" if self.has_aux else True)
            loss = self.loss(logits, labels)
            if isinstance(reducer := self.net.reducer, Trains):
                taught = self._teach(images, labels)
                extra = self.net.auxiliary_losses(info, logits, labels, taught)
                loss = reducer.class_weight * loss
            if self._related:
                related = self._relations(images, self.net.outcome(info, logits, labels))
        else:
            loss = self._mean_loss(images, labels)
        for factor, losses in ((self.aux_weight, extra), (1.0, related)):
            for name, value in losses.items():
                self.log(f"train/loss_{name}", value.detach(), on_step=False, on_epoch=True)
                loss = loss + factor * value
        size = len(images)
        self.log("train/loss", loss.detach(), on_epoch=True, prog_bar=True, batch_size=size)
        return loss

    def mixed(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Images and labels, mixed if that was chosen."""
        images, labels = batch[0], batch[1]
        # timm's Mixup pairs images within the batch, so an odd one (a last batch) is left as is.
        if self.mix is not None and len(images) % 2 == 0:
            images, labels = self.mix(images, labels)
        return images, labels

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Stop where training diverges; let the reducer put its parameters right."""
        check_step(self, outputs, batch, batch_idx)
        if isinstance(reducer := getattr(self.net, "reducer", None), Learned):
            reducer.after_step()

    def trainable(self) -> nn.Module:
        """What the optimiser gets."""
        return self.net

    def _mean_loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Mean over the losses of the model's heads, of which most models have one."""
        heads = getattr(self.net, "training_logits", None)
        logits = (self.net(images),) if heads is None else heads(images)
        return torch.stack([self.loss(answer, labels) for answer in logits]).mean()

    def configure_optimizers(self) -> Any:
        """Return the optimiser and its schedule, stepped after every optimiser step.

        Raises:
            ZooError: the length of the run is not known.
        """
        total = self.trainer.estimated_stepping_batches
        if total == float("inf"):
            raise ZooError("the data does not say its length; type +trainer.max_steps=N")
        kwargs: dict[str, Any] = {}
        # A fused step unscales gradients itself, so that they cannot be clipped; not every fused
        # optimiser takes parameters in shares.
        in_shares = any(hasattr(p, "to_local") for p in self.net.parameters())
        mixed = str(self.trainer.precision).endswith("-mixed")
        if (mixed or in_shares) and _takes(self.make_optimizer, "fused"):
            kwargs["fused"] = False
        optimizer = self.make_optimizer(self.trainable(), **kwargs)
        if learned := list(self.loss.parameters()):
            optimizer.add_param_group({"params": learned})
        epochs = self.trainer.max_epochs or 1
        total = int(total)
        schedule = self.make_schedule(
            optimizer, total_steps=total, steps_per_epoch=total / max(1, epochs)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the recipe as it is now: a search may have changed the schedule."""
        recipe = _plain({"recipe": getattr(self.net, "recipe", None)})
        checkpoint["hyper_parameters"] = {**checkpoint.get("hyper_parameters", {}), **recipe}

    def setup(self, stage: str) -> None:
        """Refuse callbacks that watch what is never logged, before an epoch is spent on it."""
        if stage == "fit":
            train = {f"train/{name}{end}" for name in self.logs for end in ("", "_step", "_epoch")}
            metrics: nn.ModuleDict = self.get_submodule("val_metrics")  # type: ignore[assignment]
            check_monitors(self.trainer, train | {f"val/{name}" for name in metrics})

    def on_fit_start(self) -> None:
        """Bring the teachers, which are no part of the module, to the device."""
        for teacher in (*self._teacher, *self._related):
            teacher.to(self.device)

    def _teach(self, images: Tensor, labels: Tensor) -> Any:
        """What the frozen dense model, or a second pass, makes of the same images, or None."""
        if not self._teacher:
            return self.net.peer(images, labels)
        teacher = self._teacher[0]
        with torch.no_grad():
            logits, info = teacher(images, return_info="trace")
            return teacher.outcome(info, logits, labels)

    def _relatives(self, given: ReducedViT | None) -> list[ReducedViT]:
        """The dense model that the loss compares tokens with, where it does."""
        if not isinstance(self.loss, TokenRelations):
            return []
        if type(self).training_step is not Classifier.training_step:
            raise ZooError(
                f"loss=trg goes with module=classifier: a {type(self).__name__} has its own loss"
            )
        if self.net.anatomy.alone is None and given is None:
            given = next(iter(self._teacher), None) or _dense_copy(self.net)
        self.loss.fit(self.net, given or self.net)
        assert given is not None
        return [given.eval().requires_grad_(False)]

    def _relations(self, images: Tensor, student: Outcome) -> Mapping[str, Tensor]:
        teacher, loss = self._related[0], self.loss
        assert isinstance(loss, TokenRelations)
        with torch.no_grad():
            logits, info = teacher(images, return_info=True)
            dense = teacher.outcome(info, logits, student.targets)
        total = self.trainer.estimated_stepping_batches
        return loss.relations(student, dense, self.trainer.global_step / max(1, total - 1))

    def finish(self, folder: Path, write: bool) -> dict[str, Any]:
        """Called after the test, before the model is described and saved.

        Args:
            folder: Of the run.
            write: Whether this process writes files.

        Returns:
            Fields of the result row that this module knows better than the run does.
        """
        return {}

    # -- evaluation -------------------------------------------------------------------------------

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Count one batch."""
        self._count("val", batch)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Count one batch."""
        self._count("test", batch)

    def on_validation_epoch_end(self) -> None:
        """Log the accuracy."""
        self._report("val")

    def on_test_epoch_end(self) -> None:
        """Log the accuracy."""
        self._report("test")

    def _evaluated(self) -> ReducedViT:
        """The model that answers: a copy with its weights cast, made once per evaluation, or it."""
        if self.evaluated_in is None:
            return self.net
        if not self._cast:
            self._cast.append(copy.deepcopy(self.net).to(self.evaluated_in))
        return self._cast[0]

    def _count(self, part: str, batch: tuple[Tensor, Tensor]) -> None:
        images, labels = batch[0], batch[1]
        net = self._evaluated()
        # Also of blanks: others may wait for this process in it.
        logits = net(like_weights(images, net, images.device)).float()
        real = labels != NO_IMAGE
        check_answers(self, part, logits[real], (images[real], labels[real]))
        logits, labels = logits[real], labels[real]
        metrics = getattr(self, f"{part}_metrics")
        for name, metric in metrics.items():
            if name == "images":
                metric.update(len(labels))
            elif not len(labels):
                continue
            elif name == "loss":
                metric.update(nn.functional.cross_entropy(logits, labels, reduction="none"))
            else:
                metric.update(logits, labels)

    def _report(self, part: str) -> None:
        self._cast.clear()  # the weights go on learning
        if not getattr(self, f"{part}_metrics")["images"].compute():
            raise ZooError(f"no image of the {part} split could be read")
        for name, metric in getattr(self, f"{part}_metrics").items():
            value = metric.compute()  # over all processes
            value = 100 * value if name.startswith("top") else value
            self.log(f"{part}/{name}", value, prog_bar=name == "top1")
            metric.reset()


def _freeze_others(net: nn.Module, patterns: Sequence[str]) -> None:
    named = dict(net.named_parameters())
    kept = {name for name in named if any(fnmatchcase(name, p) for p in patterns)}
    if not kept:
        raise ZooError(
            f"module.train_only={list(patterns)} leaves nothing to train; the parts of this model "
            f"are {sorted({n.split('.')[0] + '.*' for n in named})}; type module=classifier"
        )
    for name, parameter in named.items():
        parameter.requires_grad_(parameter.requires_grad and name in kept)


def _dense_copy(net: ReducedViT) -> ReducedViT:
    """The same backbone, frozen as it is now, with nothing reduced."""
    from zoo.model.reduced import ReducedViT

    dense = ReducedViT(copy.deepcopy(net.backbone))
    return dense.eval().requires_grad_(False)


def _mixup(
    options: Mapping[str, Any] | None, classes: int, loss: nn.Module
) -> Callable[..., Any] | None:
    options = dict(options or {})
    known = {"mixup_alpha", "cutmix_alpha", "prob", "switch_prob"}
    if set(options) - known:
        raise ZooError(f"augment.mixup takes {sorted(known)}, got {sorted(options)}")
    if not (options.get("mixup_alpha") or options.get("cutmix_alpha")) or options.get("prob") == 0:
        return None
    from timm.data import Mixup

    # torch's cross-entropy smooths mixed labels by itself; losses of timm leave that to the mixing.
    smoothing = float(getattr(loss, "smoothing", 0.0))
    return Mixup(label_smoothing=smoothing, num_classes=classes, **options)


def _takes(function: Any, name: str) -> bool:
    import inspect

    return name in inspect.signature(function).parameters


def _plain(value: Any, where: str = "hyper_parameters") -> Any:
    """Copy a value, refusing what weights-only loading would refuse later."""
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, dict):
        return {str(k): _plain(v, f"{where}.{k}") for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v, f"{where}[{i}]") for i, v in enumerate(value)]
    raise ZooError(
        f"{where} must be plain containers and values (OmegaConf.to_container makes them), got "
        f"{type(value).__name__}"
    )
