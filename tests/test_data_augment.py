"""Augmentation: every recipe survives every picture, on the Pillow that is installed."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from PIL import Image

from zoo.data.transforms import train_transform
from zoo.errors import ZooError

CONFIGS = str(Path(__file__).parents[1] / "configs")


def augmentations() -> dict[str, dict]:
    GlobalHydra.instance().clear()
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        names = sorted(path.stem for path in (Path(CONFIGS) / "augment").glob("*.yaml"))
        found = {n: compose("train", overrides=[f"augment={n}"]).augment for n in names}
    plain = {name: OmegaConf.to_container(node) for name, node in found.items()}
    for policy in ("v0", "v0r", "original", "originalr", "3a", "augmix-m3-w3", "rand-m9-inc1-n3"):
        plain[policy] = {**plain["deit"], "auto_augment": policy}
    return plain


@pytest.mark.parametrize("channels", [1, 3])
def test_every_augmentation_survives_any_picture(channels):
    config = {
        "input_size": (channels, 32, 32),
        "mean": (0.5,) * channels,
        "std": (0.5,) * channels,
        "interpolation": "bicubic",
        "crop_pct": 0.9,
        "crop_mode": "center",
    }
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    rng = np.random.default_rng(0)
    noise = [
        rng.integers(0, 255, (*size, 3), dtype=np.uint8) for size in ((40, 30), (1, 9), (3, 3))
    ]
    images = [Image.fromarray(x) for x in noise]
    images += [image.convert(mode) for image in images[:1] for mode in ("L", "RGBA", "P", "CMYK")]
    for augment in augmentations().values():
        transform = train_transform(config, augment)
        for image in images * 12:
            assert transform(image).isfinite().all()


def test_posterizing_to_0_bits_leaves_nothing():
    augment = {"auto_augment": "rand-m10-n1-inc1", "hflip": 0.0}
    config = {
        "input_size": (3, 8, 8),
        "mean": (0.0,) * 3,
        "std": (1.0,) * 3,
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "crop_mode": "center",
    }
    transform = train_transform(config, augment)
    [chosen] = [s for s in transform.transforms if hasattr(s, "ops")]
    chosen.ops = [op for op in chosen.ops if op.name == "PosterizeIncreasing"]
    assert chosen.ops
    chosen.choice_weights = None
    for op in chosen.ops:
        op.prob = 1.0
    assert transform(Image.new("RGB", (8, 8), "white")).max() == 0


def test_augmentation_that_timm_does_not_know_is_one_line():
    config = {"input_size": (3, 8, 8), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    config = {**config, "interpolation": "bicubic", "crop_pct": 1.0, "crop_mode": "center"}
    for augment in ({"auto_augment": "banana"}, {"auto_augment": "rand-x9"}, {"scale": 3}):
        with pytest.raises(ZooError, match="timm makes no transforms of") as info:
            train_transform(config, augment)
        assert "\n" not in str(info.value)
    with pytest.raises(ZooError, match="works on grey and colour images, the model takes 4"):
        train_transform({**config, "input_size": (4, 8, 8)}, {"auto_augment": "rand-m9"})


def test_nothing_is_turned_upside_down_either_where_mirrors_are_off():
    config = {"input_size": (1, 8, 8), "mean": (0.0,), "std": (1.0,)}
    config = {**config, "interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "center"}
    pixels = np.zeros((8, 8), np.uint8)
    pixels[:4] = 255
    sure = {"vflip": 1.0, "scale": [1.0, 1.0], "ratio": [1.0, 1.0]}
    assert train_transform(config, sure, mirror=False)(Image.fromarray(pixels))[0, 0, 0] == 1
    assert train_transform(config, sure, mirror=True)(Image.fromarray(pixels))[0, 0, 0] == 0
