"""torchvision's vision transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torchvision
from torchvision.models.vision_transformer import ConvStemConfig, VisionTransformer

from zoo.errors import UnknownName, ZooError
from zoo.libraries.build import Built, fetched
from zoo.libraries.names import LIBRARIES, TORCHVISION

_LIBRARY = LIBRARIES["torchvision"]
_IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
_DATA = {**_IMAGENET, "interpolation": "bilinear", "crop_pct": 0.875, "crop_mode": "center"}
#: Arguments that may be changed, and those of the constructor that a recipe holds.
_CHANGES = ("representation_size", "dropout", "attention_dropout")
_STEM = "conv_stem_configs"
_SHAPE = ("image_size", "patch_size", "num_layers", "num_heads", "hidden_dim", "mlp_dim")


def create(name: str, pretrained: bool, args: dict[str, Any]) -> Built:
    """See `zoo.libraries.build`, as for the other."""
    stem, _, tag = name.partition(".")
    if stem not in TORCHVISION:
        raise UnknownName("vision transformer of torchvision", stem, TORCHVISION)
    tags = torchvision.models.get_model_weights(stem)
    if tag and tag not in tags.__members__:
        raise UnknownName(f"weights of torchvision's {stem}", tag, list(tags.__members__))
    given = _renamed(args)
    unknown = sorted(set(given) - {"image_size", *_CHANGES})
    if unknown:
        raise ZooError(
            f"torchvision's {stem} has no argument {unknown[0]!r}; expected img_size, num_classes, "
            f"{', '.join(_CHANGES)}"
        )
    chosen = tags[tag] if tag else tags.DEFAULT
    if not pretrained:
        model = torchvision.models.get_model(stem, weights=None, **given)
        return Built(model, stem, None, _DATA)
    size = chosen.transforms().crop_size[0]
    if given.pop("image_size", size) != size:
        raise ZooError(
            f"the weights {chosen.name} of torchvision's {stem} are for images of {size}x{size}; "
            "leave img_size out"
        )
    try:
        model = torchvision.models.get_model(stem, weights=chosen, **given)
    except (OSError, RuntimeError) as error:
        raise fetched(f"the weights {chosen.name} of {stem}", _LIBRARY, error) from error
    return Built(model, stem, chosen.name, _transforms(chosen))


def rebuild(name: str, args: dict[str, Any]) -> Built:
    """See `zoo.libraries.build`."""
    given = _renamed(args)
    unknown = sorted(set(given) - {*_SHAPE, *_CHANGES, _STEM})
    missing = [key for key in _SHAPE if key not in given]
    if unknown or missing:
        wrong = f"has no argument {unknown[0]!r}" if unknown else f"needs {missing[0]!r}"
        raise ZooError(f"torchvision's VisionTransformer {wrong}")
    if _STEM in given:
        given[_STEM] = [ConvStemConfig(*layer) for layer in given[_STEM]]
    return Built(VisionTransformer(**given), name, None, _DATA)


def _renamed(args: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by torchvision's names."""
    given = {k: v for k, v in args.items() if k != "num_classes"}
    if "img_size" in given:
        size = given.pop("img_size")
        sides = (size, size) if isinstance(size, int) else tuple(size)
        if len(set(sides)) != 1:
            raise ZooError(f"torchvision's towers take square images, got img_size={list(sides)}")
        given["image_size"] = sides[0]
    return given


def _transforms(weights: Any) -> dict[str, Any]:
    given = weights.transforms()
    return {
        "mean": tuple(given.mean),
        "std": tuple(given.std),
        "interpolation": given.interpolation.value,
        "crop_pct": given.crop_size[0] / given.resize_size[0],
        "crop_mode": "center",
    }
