"""From a model's data configuration and an `augment` option to transforms, built by timm."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import AugmentOp, posterize
from torchvision import transforms as tv
from torchvision.transforms import InterpolationMode

from zoo.data.images import Picture
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
# What a message names of the options: those that may be wrong.
_NAMED = (*TIMM_KEYS, "interpolation", "crop_pct", "crop_mode")
KEYS = frozenset({*TIMM_KEYS, "hflip", "affine", "mixup"})


def eval_transform(config: Mapping[str, Any]) -> Callable[[Image.Image], Any]:
    """Return timm's inference transform for a data configuration."""
    chain = _by_timm(config, is_training=False)
    return tv.Compose([Picture(config["input_size"][0]), *chain])


def train_transform(
    config: Mapping[str, Any], augment: Mapping[str, Any] | None, mirror: bool = True
) -> Callable[[Image.Image], Any]:
    """Return the training transform.

    Args:
        config: The data configuration, as timm resolves it.
        augment: The `augment` option; None means the inference transform.
        mirror: False when a mirrored image may belong to another class: nothing is flipped then.

    Raises:
        ZooError: the option holds a key that does not exist, or does not work on such images.
    """
    channels = config["input_size"][0]
    if not augment:
        return eval_transform(config)
    unknown = sorted(set(augment) - KEYS)
    if unknown:
        raise ZooError(f"unknown augment keys {unknown}; known: {sorted(KEYS)}")
    picked = {k: augment[k] for k in TIMM_KEYS if augment.get(k) is not None}
    if not augment.get("color_jitter"):
        picked["color_jitter"] = None  # timm's own default would be 0.4
    if not mirror:
        picked["vflip"] = 0.0
    if channels == 4 and picked.get("auto_augment"):
        raise ZooError(
            "augment.auto_augment works on grey and colour images, the model takes 4 channels; "
            "type augment.auto_augment=null"
        )
    picked["hflip"] = float(augment.get("hflip") or 0.0) if mirror else 0.0
    chain = _by_timm(config, is_training=True, **picked)
    for step in chain:
        for op in _operations(step):
            if op.aug_fn is posterize:
                op.aug_fn = _posterize
    affine = augment.get("affine")
    if affine and any(affine.values()):
        chain.insert(1, _affine(affine))  # after the crop that sets the size
    return tv.Compose([Picture(channels), *chain])


def _by_timm(config: Mapping[str, Any], **options: Any) -> list[Any]:
    """timm's steps; what it does not know comes out of it as an error of many kinds."""
    try:
        return list(create_transform(**config, **options).transforms)
    except (ArithmeticError, AssertionError, LookupError, TypeError, ValueError) as error:
        given = {**config, **options}
        words = ", ".join(f"{k}={given[k]}" for k in _NAMED if given.get(k) is not None)
        reason = " ".join(str(error).split()) or "it gives no reason"
        raise ZooError(f"timm makes no transforms of {words}: {reason}") from error


def _operations(step: Any) -> list[AugmentOp]:
    """The operations that one of timm's automatic augmentations draws from."""
    found = [*getattr(step, "ops", ()), *(op for one in getattr(step, "policy", ()) for op in one)]
    return [op for op in found if isinstance(op, AugmentOp)]


def _posterize(image: Image.Image, bits: int, **options: Any) -> Image.Image:
    """timm's posterize, also where it asks for 0 bits, which Pillow refuses: black."""
    return posterize(image, bits, **options) if bits > 0 else image.point(lambda _: 0)


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
