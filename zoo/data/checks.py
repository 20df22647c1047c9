"""Does the data fit the model? One clear line when it does not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from zoo.data.classes import ORDERS
from zoo.errors import ZooError

#: What of the data says how an image looks to a model.
IMAGE_OPTIONS = ("img_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")


def data_config(model: nn.Module, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Resolve how images must look for a model: timm's data configuration, with overrides.

    Size and channels are read from the model itself where it is wrapped or has a patch embedding,
    because timm's configuration still names the published ones when a model is built with another
    `img_size`.

    Args:
        model: A timm model, or a wrapped one with `pretrained_cfg`, `backbone` and `tower`.
        overrides: `img_size`, `mean`, `std`, `interpolation`, `crop_pct`, `crop_mode`; None is no
            override.

    Returns:
        `input_size` (C, H, W), `mean`, `std`, `interpolation`, `crop_pct`, `crop_mode`.

    Raises:
        ZooError: the patch size does not divide the image size, or the model takes another size.
    """
    from timm.data import resolve_data_config

    given = {k: v for k, v in (overrides or {}).items() if v is not None}
    published: Any = getattr(model, "pretrained_cfg", None) or {}
    # timm's defaults where nothing was published, but not its refusal of an empty mapping.
    config = dict(resolve_data_config(pretrained_cfg=dict(published) or {"tag": None}))
    backbone: Any = getattr(model, "backbone", model)
    embed: Any = getattr(backbone, "patch_embed", None)
    wrapper: Any = None if backbone is model else model
    channels, height, width = _own_size(wrapper, embed, config["input_size"])
    if "img_size" in given:
        size = given.pop("img_size")
        height, width = (size, size) if isinstance(size, int) else tuple(size)
    config["input_size"] = (channels, height, width)
    for key in ("mean", "std"):
        typed = key in given
        value = given.pop(key, config[key])
        value = (value,) if isinstance(value, int | float) else tuple(value)
        if typed and len(value) not in (1, channels):
            raise ZooError(
                f"data.{key} holds {len(value)} numbers, expected "
                f"{' or '.join(map(str, sorted({1, channels})))}: the model takes images of "
                f"{channels} channel{'s' if channels > 1 else ''}"
            )
        if len(value) not in (1, channels):
            # Three published channel means for a one-channel model (or one for three).
            value = (sum(value) / len(value),)
        config[key] = value * channels if len(value) == 1 else value
    config.update(given)
    name = type(getattr(model, "backbone", model)).__name__
    # Some published models leave a margin that no patch covers.
    margin = (height, width) == tuple((published.get("input_size") or ())[1:])
    _check_size(embed, (height, width), name, margin)
    return config


def _own_size(wrapper: Any, embed: Any, published: Sequence[int]) -> tuple[int, int, int]:
    """Channels, height and width of the images that a model was built for."""
    if wrapper is not None:
        return wrapper.tower.input_size(wrapper.backbone)  # type: ignore[no-any-return]
    channels, height, width = published
    # Before the projection there may be a convolutional stem.
    convs = (m for m in (embed.modules() if embed is not None else ()) if isinstance(m, nn.Conv2d))
    first = next(convs, None)
    height, width = getattr(embed, "img_size", None) or (height, width)
    return channels if first is None else first.in_channels, height, width


def _check_size(embed: Any, size: tuple[int, int], name: str, margin: bool) -> None:
    patch = getattr(embed, "patch_size", None)
    if patch is None:
        return
    patch = (patch, patch) if isinstance(patch, int) else tuple(patch)
    padded = margin or getattr(embed, "dynamic_img_pad", False)
    if not padded and any(s % p for s, p in zip(size, patch, strict=True)):
        fits = _typed([max(p, round(s / p) * p) for s, p in zip(size, patch, strict=True)])
        raise ZooError(
            f"image size {_by(size)} is not a multiple of the patch size {_by(patch)} of the "
            f"{name}; expected for example data.img_size={fits}"
        )
    built = getattr(embed, "img_size", None)
    if getattr(embed, "strict_img_size", True) and built and tuple(built) != size:
        raise ZooError(
            f"the {name} was built for {_by(built)} images, the data has {_by(size)}; type "
            f"+backbone.args.img_size={_typed(size)} to build it for that size"
        )


def _typed(size: Sequence[int]) -> str:
    """A size as it is typed: one number for a square."""
    return str(size[0]) if size[0] == size[1] else f"[{size[0]},{size[1]}]"


def check_classes(model: nn.Module, num_classes: int | None, name: str) -> None:
    """Refuse data whose classes are not the outputs of the model's head.

    Args:
        model: Anything with timm's `num_classes`.
        num_classes: Of the data; None when it cannot be known in advance.
        name: Of the data, for the message.

    Raises:
        ZooError: the numbers differ.
    """
    outputs = getattr(model, "num_classes", None)
    if num_classes is not None and outputs is not None and num_classes != outputs:
        raise ZooError(
            f"{name} has {num_classes} classes, the model's head has {outputs} outputs; expected "
            "the same number (part of a bigger data set needs data.class_map and data.num_classes)"
        )


def check_choices(class_order: str | None, damaged: str, **flags: bool) -> None:
    """Refuse words that are none of the choices of an option.

    Args:
        class_order: The option of that name.
        damaged: Likewise.
        **flags: Options that are true or false.

    Raises:
        ZooError: With the choices.
    """
    if class_order not in (None, *ORDERS):
        raise ZooError(
            f"data.class_order={class_order}: expected natural (timm's order, 2 before 10), "
            "plain (torchvision's, 10 before 2) or null"
        )
    if damaged not in ("skip", "fail"):
        raise ZooError(f"data.damaged={damaged}: expected skip or fail")
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise ZooError(f"data.{name} must be true or false, got {value!r}")


def _by(size: Any) -> str:
    return "x".join(map(str, size))
