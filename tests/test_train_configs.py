"""Every option of every group that training reads composes and builds."""

from __future__ import annotations

from pathlib import Path

import hydra.utils
import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

import zoo
from tests.covering import every
from zoo.data.fashion_mnist import DEBIAN
from zoo.data.module import ImageData
from zoo.data.transforms import train_transform
from zoo.lit.classifier import Classifier
from zoo.run.train import instantiate_trainer, train

CONFIGS = Path(__file__).parents[1] / "configs"
GROUPS = ("data", "augment", "loss", "optim", "lr_schedule", "trainer", "callbacks", "logger")
OPTIONS = [(g, p.stem) for g in GROUPS for p in sorted((CONFIGS / g).glob("*.yaml"))]
EXPERIMENTS = sorted(p.stem for p in (CONFIGS / "experiment").glob("*.yaml"))
NEEDS = {"tensorboard": "tensorboard", "wandb": "wandb"}


def config(*overrides: str):
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose("train", list(overrides))


def test_every_group_has_options():
    assert {g for g, _ in OPTIONS} == set(GROUPS) and EXPERIMENTS


@pytest.mark.parametrize(("group", "option"), OPTIONS, ids=[f"{g}={o}" for g, o in OPTIONS])
def test_option_builds(group: str, option: str, tmp_path):
    if option in NEEDS:
        pytest.importorskip(NEEDS[option])
    overrides = [f"{group}={option}", f"output_dir={tmp_path}"]
    if (group, option) == ("optim", "timm"):
        overrides += ["optim.opt=lion", "optim.lr=1e-4"]
    if group == "trainer":
        overrides += ["trainer.accelerator=cpu"]
        overrides += ["trainer.devices=2"] if option == "ddp" else []
    cfg = config(*overrides)
    if group in ("trainer", "callbacks", "logger"):
        trainer = instantiate_trainer(cfg)
        assert trainer.max_epochs == cfg.trainer.max_epochs
        if group == "logger":
            assert len(trainer.loggers) == (option != "none")
        if option == "ddp":
            assert type(trainer.strategy).__name__ == "DDPStrategy"
        return
    if group == "data":
        data = hydra.utils.instantiate(cfg.data, seed=1, augment=None)
        assert isinstance(data, ImageData) and data.name == cfg.data.name
        return
    augment = OmegaConf.to_container(cfg.augment)
    sizes = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    assert callable(train_transform({**sizes, "interpolation": "bicubic"}, augment))
    module = Classifier(
        # Some recipes are for the learned parts of one method.
        zoo.create_model(
            "vit_digits", "ltmp" if option == "thresholds" else None, embed_dim=32, depth=2
        ),
        optimizer=hydra.utils.instantiate(cfg.optim),
        lr_schedule=hydra.utils.instantiate(cfg.lr_schedule),
        loss=hydra.utils.instantiate(cfg.loss),
        mixup=augment["mixup"],
    )
    optimizer = module.make_optimizer(module.net)
    peak = optimizer.param_groups[-1]["lr"]
    schedule = module.make_schedule(optimizer, total_steps=10, steps_per_epoch=5.0)
    assert 0 < schedule.get_last_lr()[-1] <= peak


@pytest.mark.parametrize("experiment", every(EXPERIMENTS, 4))
def test_experiment_runs(experiment: str, tmp_path):
    if "fashion" in experiment and not DEBIAN.is_dir():
        pytest.skip("needs Debian's package dataset-fashion-mnist")
    # The second stage goes on from the model of the first one, which the command names.
    start = ["weights=vit_fashion"] if experiment == "vit_fashion" else []
    row = train(
        config(
            f"experiment={experiment}",
            *start,
            f"output_dir={tmp_path}",
            "trainer.accelerator=cpu",
            "trainer.precision=32-true",
            "trainer.enable_progress_bar=false",
            "trainer.fast_dev_run=true",
        )
    )
    assert row["status"] == "ok" and (tmp_path / "model" / "config.json").is_file()
