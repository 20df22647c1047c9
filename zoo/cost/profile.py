"""The cost of a model for one image, as a person asks for it."""

from __future__ import annotations

from collections import Counter

from torch import nn

from zoo.cost.analytic import counted
from zoo.cost.sampling import NO_IMAGES, Images, is_adaptive, of_one_size, sample
from zoo.cost.types import Profile, mean_of
from zoo.errors import ZooError
from zoo.model.anatomy import Anatomy
from zoo.model.attached import as_reduced
from zoo.model.reduced import ReducedViT

CONVENTIONS = ("zoo", "diffrate")


def profile(
    model: nn.Module,
    img_size: int | tuple[int, int] | None = None,
    convention: str = "zoo",
    images: Images | None = None,
) -> Profile:
    """Count parameters, multiply-accumulates and tokens, as a rule without running the model.

    Args:
        model: A `ReducedViT`, a supported model, or one that something is attached to.
        img_size: Image size in pixels; None is the model's own.
        convention: "zoo" (see `zoo.cost.analytic`) or "diffrate": that paper's formula, which
            counts the patch embedding once for every prefix token too and leaves matching out.
        images: `(N, 3, H, W)`, a mapping that the model itself takes in their place (NaFlex), or
            batches of either. Counts are means over the images, each at its own size. A method that
            keeps a different number of tokens in every image is run on them; without images its
            counts are upper limits.

    Raises:
        ZooError: If the convention is unknown or the image size does not fit.
    """
    if convention not in CONVENTIONS:
        raise ZooError(f"convention must be one of {CONVENTIONS}, got {convention!r}")
    wrapped = as_reduced(model)
    if images is not None and img_size is not None:
        raise ZooError("images have a size of their own; leave img_size away, or images")
    if images is not None and is_adaptive(wrapped):
        if convention != "zoo":
            raise ZooError(
                "a cost measured on images has the convention 'zoo'; leave convention away"
            )
        return sample(wrapped, images)
    anatomy = wrapped.anatomy

    def count(grid: tuple[int, int] | None) -> Profile:
        return counted(
            anatomy,
            wrapped.schedule,
            grid,
            convention,
            wrapped.runtime.last_block,
            params=sum(p.numel() for p in model.parameters()),
        )

    if images is None:
        return count(None if img_size is None else _grid(anatomy, img_size))
    return mean_of([(count(grid), n) for grid, n in _grids(wrapped, images).items()])


def _grids(model: ReducedViT, images: Images) -> Counter[tuple[int, int]]:
    """How many images there are of every patch grid.

    Raises:
        ZooError: If there are none, or the model would refuse them.
    """
    found: Counter[tuple[int, int]] = Counter()
    for batch in of_one_size(model, images):
        model.checked(batch)
        if len(batch):
            found[model.tower.grid_of(model.backbone, batch)] += len(batch)
    if not found:
        raise ZooError(NO_IMAGES)
    return found


def _grid(anatomy: Anatomy, img_size: int | tuple[int, int]) -> tuple[int, int]:
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    if (height, width) == anatomy.tower.input_size(anatomy.backbone)[1:]:
        return anatomy.grid
    patch = anatomy.tower.patch_size(anatomy.backbone)
    if height % patch[0] or width % patch[1]:
        raise ZooError(
            f"image size {height}x{width} is not divisible by the patch size {patch[0]}x{patch[1]}"
        )
    return height // patch[0], width // patch[1]
