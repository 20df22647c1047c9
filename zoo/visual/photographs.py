"""From files to what a model sees, and back to a picture of it."""

from __future__ import annotations

import glob
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from zoo.adapters.tower import Tower
from zoo.data.checks import data_config
from zoo.data.folder import image_extensions
from zoo.data.images import opened, reason, upright
from zoo.data.transforms import eval_transform
from zoo.errors import ZooError
from zoo.model.reduced import ReducedViT

#: What is taken for one image.
Picture = str | os.PathLike[str] | Image.Image | np.ndarray[Any, Any] | Tensor


class Seen(NamedTuple):
    """One image as a model takes it.

    Attributes:
        name: Of its file, or its number.
        tensor: `(1, C, H, W)`, normalised.
        picture: The same as a picture, colours as before the normalisation.
    """

    name: str
    tensor: Tensor
    picture: Image.Image


def files_of(given: Any) -> list[Path]:
    """The image files that a file, a folder, a glob or a list of them names.

    Args:
        given: One, or a list; folders are looked through with all that is in them.

    Raises:
        ZooError: If there is none.
    """
    found: list[Path] = []
    for one in [given] if isinstance(given, str | os.PathLike) else list(given or ()):
        found += _files(Path(os.path.expanduser(os.fspath(one))))
    if not found:
        raise ZooError(
            "there are no images to look at; type images=FILE, a folder, a pattern such as "
            "'images=\"photos/*.jpg\"', or a list [a.jpg,b.jpg]"
        )
    return list(dict.fromkeys(found))


def _files(path: Path) -> list[Path]:
    known = image_extensions()
    if path.is_file():
        return [path]
    if path.is_dir():
        inside = (p for p in path.rglob("*") if p.is_file() and p.suffix.lower() in known)
        # macOS puts notes beside photographs, ._a.jpg beside a.jpg, which are no images.
        found = sorted(p for p in inside if not p.name.startswith("."))
        if not found:
            raise ZooError(f"images={path}: the folder holds no images")
        return found
    if glob.has_magic(str(path)):
        found = sorted(Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file())
        if not found:
            raise ZooError(f"images={path}: no file is called so")
        return found
    raise ZooError(f"images={path}: there is no such file or folder")


def look(
    model: ReducedViT, images: Sequence[Picture], options: Mapping[str, Any] | None = None
) -> list[Seen]:
    """Prepare images as they are prepared for evaluation.

    Args:
        model: Whose.
        images: Paths, Pillow images, arrays `(H, W)` or `(H, W, 3)` of 8 bits; or tensors
            `(C, H, W)`, which are taken as they are.
        options: Of the data: `img_size`, `crop_pct`, `mean` and so on; `upright`, unless false,
            turns photographs as their EXIF tag says.

    Raises:
        ZooError: If one of them is no image, naming it.
    """
    given = dict(options or {})
    turn = given.pop("upright", True)
    config = data_config(model, given)
    prepare = eval_transform(config)
    seen = []
    for number, image in enumerate(images):
        name = _name(image, number)
        if isinstance(image, Tensor):
            tensor = _checked(image, name)
        else:
            try:
                tensor = prepare(_opened(image, turn))
            except Exception as error:  # files break in as many ways as there are formats
                raise ZooError(f"{name}: {reason(error)}") from error
        tensor = tensor.float().unsqueeze(0)
        seen.append(Seen(name, tensor, as_picture(tensor[0], config["mean"], config["std"])))
    return seen


def _name(image: Picture, number: int) -> str:
    if isinstance(image, str | os.PathLike):
        return os.fspath(image)
    return str(getattr(image, "filename", "") or f"image {number}")


def _opened(image: Any, turn: bool) -> Image.Image:
    if isinstance(image, str | os.PathLike):
        with open(image, "rb") as file:
            image = opened(file)
    if isinstance(image, Image.Image):
        return upright(image) if turn else image
    array = np.asarray(image)
    if array.dtype != np.uint8 or array.ndim not in (2, 3):
        raise ZooError(
            f"expected an image, or an array (H, W, 3) of 8 bits, got {array.dtype} of the shape "
            f"{array.shape}"
        )
    return Image.fromarray(array)


def _checked(image: Tensor, name: str) -> Tensor:
    if image.dim() != 3 or not image.is_floating_point():
        raise ZooError(
            f"{name}: expected a tensor (C, H, W) of floats, normalised as the model takes it, got "
            f"{image.dtype} of the shape {tuple(image.shape)}"
        )
    return image.detach().cpu()


def as_picture(tensor: Tensor, mean: Sequence[float], std: Sequence[float]) -> Image.Image:
    """What a model sees, in the colours that it had before it was normalised.

    Args:
        tensor: `(C, H, W)`; of four channels the first three are shown.
        mean: Of the normalisation.
        std: Likewise.
    """
    channels = len(tensor)
    mean, std = (list(v) if len(v) == channels else [v[0]] * channels for v in (mean, std))
    pixels = tensor * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
    pixels = pixels[:3] if channels >= 3 else pixels[:1].expand(3, -1, -1)
    array = (pixels.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    return Image.fromarray(array, "RGB")


def on_cells(
    picture: Image.Image, tower: Tower, backbone: Any, grid: tuple[int, int]
) -> Image.Image:
    """The part of a picture that the patches cover; grey where they reach beyond it.

    Args:
        picture: What the model sees.
        tower: Of its family.
        backbone: The model's backbone.
        grid: Rows and columns of patches.
    """
    (rows, columns), (tall, wide) = grid, tower.patch_size(backbone)
    height, width = rows * tall, columns * wide
    # Patches that overlap, or a stem of several layers: then the grid covers the whole image.
    if abs(height - picture.height) >= tall or abs(width - picture.width) >= wide:
        return picture
    field = Image.new("RGB", (width, height), (124, 116, 104))
    field.paste(picture, (0, 0))
    return field
