"""Trains or fine-tunes a model: `train(cfg)` fits, tests, saves a model folder, returns the row."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from omegaconf import OmegaConf, open_dict

from reduction.functional import kernels
from zoo.cost.sampling import is_adaptive, sample
from zoo.data import build_data
from zoo.data.module import spread_images
from zoo.errors import BadCheckpoint, ZooError
from zoo.lit.checkpoints import write_whole
from zoo.lit.classifier import Classifier
from zoo.lit.relations import TokenRelations
from zoo.lit.sharded import check_sharding, kept_whole, make_whole
from zoo.measure.costs import count_costs, sampled_costs
from zoo.measure.describe import describe
from zoo.measure.device import pick_dtype
from zoo.results.rows import new_row, wilson_interval
from zoo.run.build import build_model, instantiate
from zoo.run.evaluate import kernels_chosen
from zoo.run.fitting import (
    check_folders,
    check_processes,
    checkpoint_of,
    fit,
    pick_weights,
    say,
)
from zoo.run.machines import where
from zoo.run.notes import training_notes, unread_images
from zoo.run.outcome import started
from zoo.run.record import check_folder
from zoo.run.resume import as_json, check_model, options_to_store, read_checkpoint, resumed
from zoo.run.teacher import teacher_of
from zoo.run.training import training_of

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from zoo.data.module import ImageData
    from zoo.model.reduced import ReducedViT

_DEMO_WEIGHTS = "vit_digits"
_DEMO_REDUCER = {"_target_": "reduction.methods.tome.ToMe"}


def train(cfg: DictConfig) -> dict[str, Any]:
    """Trains the model that a configuration describes.

    Written to `output_dir`: `checkpoints/` (the best epoch and `last.ckpt`, to resume from), logs,
    and `model/`, the folder that `zoo.load` and `eval.py weights=` read.

    Args:
        cfg: configs/train.yaml, composed.

    Returns:
        The row of `zoo.results.rows`, with the accuracy on the test split.

    Raises:
        ZooError: Something in the configuration does not fit; the message says what to type.
        Diverged: The loss is no longer a number; the message names the step and the saved batch.
        KeyboardInterrupt: Training was stopped by Ctrl-C; the last epoch's checkpoint is kept.
    """
    cfg = _complete(cfg)
    _quiet()
    with _repeatable(cfg):
        return _train(cfg)


def _train(cfg: DictConfig) -> dict[str, Any]:
    if cfg.threads:
        torch.set_num_threads(int(cfg.threads))
    seed = int(cfg.seed)
    pl.seed_everything(seed, workers=True, verbose=False)

    data = build_data(cfg)
    model = _build(cfg, data)
    data.attach(model, training=True)
    model.train()  # loaded models come in evaluation mode
    loss = instantiate(cfg.loss)
    teacher = {}
    if isinstance(loss, TokenRelations):
        teacher["teacher"] = teacher_of(cfg, loss.teacher, data)
    module: Classifier = instantiate(cfg.module)(
        model,
        optimizer=instantiate(cfg.optim),
        lr_schedule=instantiate(cfg.lr_schedule),
        loss=loss,
        mixup=_plain(OmegaConf.select(cfg, "augment.mixup")),
        aux_weight=float(cfg.aux_weight),
        **teacher,
        hyper_parameters={
            "data": _preprocessing(data),
            "config": _plain(_without_hydra(cfg)),
            "options": options_to_store(cfg),
        },
    )
    if cfg.get("weights_dtype") is not None:
        module.evaluated_in = pick_dtype(str(cfg.weights_dtype), "weights_dtype")
    done = None
    if cfg.ckpt is not None:
        done = check_model(Path(cfg.ckpt), model, module.volatile)
    trainer: pl.Trainer = instantiate_trainer(cfg)
    check_processes(trainer)
    check_sharding(trainer, module)
    check_folders(trainer)
    whole = kept_whole(trainer, module)
    start = None
    if cfg.test_start and cfg.ckpt is None:
        [first] = trainer.test(module, datamodule=data, verbose=False)
        start = float(first["test/top1"])
    seconds = fit(trainer, module, data, cfg.ckpt)
    make_whole(trainer, module, whole)
    tested = pick_weights(trainer, module, str(cfg.test))
    [scores] = trainer.test(module, datamodule=data, verbose=False)
    notes = training_notes(cfg, trainer, seconds, done, tested)
    if unread := unread_images(cfg, data, int(scores["test/images"])):
        notes += f", {unread}"
    run = {"top1_start": start, "notes": notes}
    return _finish(cfg, trainer, module, data, scores, run)


def _repeatable(cfg: DictConfig) -> contextlib.AbstractContextManager[None]:
    """Within, `trainer.deterministic` also holds for what is built and measured by itself.

    Raises:
        ZooError: The run cannot be repeated, because it depends on a clock.
    """
    deterministic = cfg.trainer.get("deterministic")
    clocks = {
        "schedule": str(OmegaConf.select(cfg, "schedule._target_")).startswith("zoo.budget.time."),
        "module.seconds": OmegaConf.select(cfg, "module.seconds") is not None,
        "trainer.max_time": cfg.trainer.get("max_time") is not None,
    }
    asked = [name for name, given in clocks.items() if given]
    if deterministic and asked:
        raise ZooError(
            f"trainer.deterministic={deterministic} goes without a clock, and {asked[0]} asks one; "
            "leave one of them out"
        )
    return kernels_chosen(bool(deterministic))


# -- before ---------------------------------------------------------------------------------------


def _complete(cfg: DictConfig) -> DictConfig:
    """Returns a copy with what "nothing chosen" stands for, and checks the plain options.

    Raises:
        ZooError: An option has a value that cannot be.
    """
    cfg = cfg.copy()
    if cfg.test not in ("best", "last"):
        raise ZooError(f"test must be best or last, got {cfg.test!r}")
    with open_dict(cfg):
        if cfg.ckpt is not None:
            cfg = _resumed(cfg)
        if cfg.get("backbone") is None and cfg.get("weights") is None:
            cfg.weights = _DEMO_WEIGHTS
            if cfg.get("reducer") is None:
                cfg.reducer = _DEMO_REDUCER
    return cfg


def _resumed(cfg: DictConfig) -> DictConfig:
    """The configuration of the run that `ckpt` is of."""
    path = Path(str(cfg.ckpt)).expanduser()
    if not path.is_file():
        raise BadCheckpoint(
            f"ckpt={cfg.ckpt}: no such file; expected a checkpoint to resume from, such as "
            "outputs/train/DATE/TIME/checkpoints/last.ckpt"
        )
    path = path.resolve()
    result = resumed(cfg, read_checkpoint(path), path)
    with open_dict(result):
        result.ckpt = str(path)
        # A resumed run goes on in its own folder: its best epoch so far is there.
        if path.parent.name == "checkpoints":
            result.output_dir = str(path.parent.parent)
            check_folder(result.output_dir)
            say(f"goes on in {os.path.relpath(result.output_dir)}")
    return result


def _build(cfg: DictConfig, data: ImageData) -> ReducedViT:
    """Builds the model with one output per class of the data, and for its image size."""
    classes = data.num_classes
    if classes == 1:
        raise ZooError(f"{data.label} has one class: there is nothing to tell apart; expected two")
    args = cfg.backbone.get("args") or {} if cfg.get("backbone") is not None else {}
    given: dict[str, Any] = {}
    if cfg.get("backbone") is not None:
        size = OmegaConf.select(cfg, "data.img_size")
        if size is not None and "img_size" not in args:
            given["img_size"] = _plain(size)
        if classes is not None and "num_classes" not in args:
            given["num_classes"] = classes
    if "num_classes" in args and classes not in (None, args["num_classes"]):
        raise ZooError(
            f"backbone.args.num_classes={args['num_classes']}: {data.label} has {classes} classes; "
            "leave it out, training makes a classifier of that size"
        )
    # Weights are cast for evaluation only, in a copy.
    learning = cfg.copy()
    with open_dict(learning):
        learning.weights_dtype = None
    model = build_model(learning, new_head="auto", **given)
    if classes is not None and classes != model.num_classes and "num_classes" not in args:
        say(f"new classifier: {classes} classes, {cfg.weights} has {model.num_classes or 'none'}")
        model.reset_classifier(classes)
    return model


def instantiate_trainer(cfg: DictConfig) -> pl.Trainer:
    """Builds the Lightning trainer with the callbacks and loggers that were chosen.

    Raises:
        ZooError: One of them cannot be built, or its package is missing.
    """
    callbacks = [instantiate(c) for c in (cfg.get("callbacks") or {}).values() if c is not None]
    if not cfg.trainer.get("enable_progress_bar", True):
        callbacks = [c for c in callbacks if not isinstance(c, pl.callbacks.ProgressBar)]
    try:
        loggers = [instantiate(c) for c in (cfg.get("logger") or {}).values() if c is not None]
    except ModuleNotFoundError as error:
        raise ZooError(f"this logger needs a package: pip install {error.name}") from error
    if not loggers:
        callbacks = [c for c in callbacks if not isinstance(c, pl.callbacks.LearningRateMonitor)]
    # Lightning keeps checkpoints of its own where no callback does.
    keeps = any(isinstance(c, pl.callbacks.Checkpoint) for c in callbacks)
    more = {} if keeps or "enable_checkpointing" in cfg.trainer else {"enable_checkpointing": False}
    from hydra.errors import InstantiationException

    from zoo.version import built

    try:
        trainer: pl.Trainer = built(
            cfg.trainer, callbacks=callbacks, logger=loggers or False, **more, **_where(cfg)
        )
    except InstantiationException as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise ZooError(f"the trainer cannot be built: {reason}") from error
    write_whole(trainer)
    return trainer


def _where(cfg: DictConfig) -> dict[str, Any]:
    """Devices and machines as torchrun has started them; nothing where it was not torchrun."""
    if started() == 1:
        return {}
    found = where(_plain(cfg.trainer))
    return {name: found[name] for name in ("devices", "num_nodes")}


# -- after ----------------------------------------------------------------------------------------


def _finish(
    cfg: DictConfig,
    trainer: pl.Trainer,
    module: Classifier,
    data: ImageData,
    scores: Mapping[str, float],
    run: Mapping[str, Any],
) -> dict[str, Any]:
    """Makes the row and saves the model folder."""
    model: ReducedViT = module.net.cpu().eval()  # type: ignore[assignment]
    images = int(scores["test/images"])
    hits = round(scores["test/top1"] / 100 * images)
    known = module.finish(Path(str(cfg.output_dir)), write=trainer.is_global_zero)
    row = describe(model)
    row.update(count_costs(model, trace=False))
    if is_adaptive(model):
        row.update(sampled_costs(sample(model, spread_images(data))))
    folder = Path(str(cfg.output_dir)) / "model"
    row.update(
        task=["train", "accuracy"],
        dataset=data.label,
        split=data.splits["test"],
        class_order=data.class_order,
        n_images=images,
        top1=100 * hits / images,
        top5=scores.get("test/top5"),
        ci95=list(wilson_interval(hits, images)),
        batch=data.batch_size,
        threads=torch.get_num_threads(),
        device=_device_name(trainer),
        dtype=str(trainer.precision),
        weights_dtype=cfg.get("weights_dtype"),
        compile=False,
        deterministic=bool(cfg.trainer.get("deterministic")),
        kernels=kernels.chosen_kernels() or None,
        seed=int(cfg.seed),
        weights=os.path.relpath(folder),
        trained=True,
        training={**training_of(cfg), "method": row["method"]},
        **run,
    )
    if "notes" in known:
        known["notes"] = f"{row['notes']}, {known['notes']}"
    row = new_row(**{**row, **known})
    last = checkpoint_of(trainer, "last")
    if trainer.is_global_zero:
        from zoo.checkpoint import save_pretrained, weights_sha256

        try:
            save_pretrained(model, folder, metrics=[row], data=_preprocessing(data))
        except (OSError, ZooError) as error:  # what was trained and measured is not lost with it
            kept = f"; the weights are in {os.path.relpath(last)}" if last else ""
            text = f"the model cannot be saved to {os.path.relpath(folder)} ({error}){kept}"
            row.update(status="failed", error=f"{text}; top-1 was {row['top1']:.2f} %")
            return row
        row["weights_sha"] = weights_sha256(folder)
    say(f"model: {os.path.relpath(folder)}")
    if last is not None:
        say(f"checkpoints: {os.path.relpath(os.path.dirname(last))}")
    return row


def _preprocessing(data: ImageData) -> dict[str, Any]:
    classes = {"class_names": data.class_names, "class_order": data.class_order}
    return as_json({**(data.config or {}), "dataset": data.label, **classes})


def _device_name(trainer: pl.Trainer) -> str:
    device = trainer.strategy.root_device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return name if trainer.world_size == 1 else f"{trainer.world_size}x {name}"


def _plain(node: Any) -> Any:
    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node


def _without_hydra(cfg: DictConfig) -> DictConfig:
    """What can be resolved later and elsewhere: the options, not the folders of this run."""
    left_out = ("paths", "output_dir", "results", "trainer", "callbacks", "logger")
    keys = [str(k) for k in cfg if k not in left_out]
    return OmegaConf.masked_copy(cfg, keys)


def _quiet() -> None:
    """Lets through what concerns the user; Lightning says much about itself."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    for text in (
        ".*does not have many workers.*",
        ".*treespec, LeafSpec.*",
        ".*smaller than the logging interval.*",
        ".*exists and is not empty.*",
        ".*saving a checkpoint outside the 'fit' stage.*",
        ".*weights_only=True.*",
        ".*configure_optimizers` returned `None`.*",  # a search that trains nothing
        ".*sync_dist=True.*",  # torchmetrics has summed over the processes already
    ):
        warnings.filterwarnings("ignore", message=text)
