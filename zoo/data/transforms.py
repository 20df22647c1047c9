"""From a model's data configuration and an `augment` option to transforms, built by timm."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from PIL import Image
from timm.data import create_transform
from torchvision import transforms as tv
from torchvision.transforms import InterpolationMode

from zoo.errors import ZooError

# What an `augment` option may hold for timm's create_transform; `affine` and `mixup` are ours.
TIMM_KEYS = (
    "scale",
    "ratio",
    "vflip",
    "color_jitter",
    "auto_augment",
    "re_prob",
    "re_mode",
    "re_count",
)
KEYS = frozenset({*TIMM_KEYS, "hflip", "affine", "mixup"})


class ToMode:
    """Convert a PIL image to the mode the model takes: `L` for one channel, `RGB` for three."""

    def __init__(self, channels: int) -> None:
        modes = {1: "L", 3: "RGB", 4: "RGBA"}
        if channels not in modes:
            raise ZooError(f"images can be given 1, 3 or 4 channels, the model takes {channels}")
        self.mode = modes[channels]

    def __call__(self, image: Image.Image) -> Image.Image:
        """Return the image in that mode."""
        return image if image.mode == self.mode else image.convert(self.mode)


def eval_transform(config: Mapping[str, Any]) -> Callable[[Image.Image], Any]:
    """Return timm's inference transform for a data configuration."""
    channels = config["input_size"][0]
    return tv.Compose([ToMode(channels), *create_transform(**config, is_training=False).transforms])


def train_transform(
    config: Mapping[str, Any], augment: Mapping[str, Any] | None, mirror: bool = True
) -> Callable[[Image.Image], Any]:
    """Return the training transform.

    Args:
        config: The data configuration, as timm resolves it.
        augment: The `augment` option; None means the inference transform.
        mirror: False when a mirrored image may belong to another class: nothing is flipped then.

    Raises:
        ZooError: the option holds a key that does not exist.
    """
    if not augment:
        return eval_transform(config)
    unknown = sorted(set(augment) - KEYS)
    if unknown:
        raise ZooError(f"unknown augment keys {unknown}; known: {sorted(KEYS)}")
    picked = {k: augment[k] for k in TIMM_KEYS if augment.get(k) is not None}
    if not augment.get("color_jitter"):
        picked["color_jitter"] = None  # timm's own default would be 0.4
    chain = create_transform(
        **config,
        is_training=True,
        hflip=float(augment.get("hflip") or 0.0) if mirror else 0.0,
        **picked,
    ).transforms
    affine = augment.get("affine")
    if affine and any(affine.values()):
        chain.insert(1, _affine(affine))  # after the crop that sets the size
    return tv.Compose([ToMode(config["input_size"][0]), *chain])


def _affine(options: Mapping[str, Any]) -> Callable[[Image.Image], Image.Image]:
    """Small random rotation, shift, zoom and shear; `{degrees, translate, scale, shear}`."""
    known = {"degrees", "translate", "scale", "shear"}
    if set(options) - known:
        raise ZooError(f"augment.affine takes {sorted(known)}, got {sorted(options)}")
    shift, zoom = options.get("translate") or 0.0, options.get("scale") or 0.0
    shear = options.get("shear") or 0.0
    return tv.RandomAffine(
        degrees=options.get("degrees") or 0.0,
        translate=(shift, shift),
        scale=(1 - zoom, 1 + zoom),
        shear=(-shear, shear),
        interpolation=InterpolationMode.BILINEAR,
    )
