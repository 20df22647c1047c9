"""The cost of a model for one image, as a person asks for it."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from zoo.cost.analytic import counted
from zoo.cost.sampling import is_adaptive, sample
from zoo.cost.types import Profile
from zoo.errors import ZooError
from zoo.model.anatomy import Anatomy
from zoo.model.attached import as_reduced

CONVENTIONS = ("zoo", "diffrate")


def profile(
    model: nn.Module,
    img_size: int | tuple[int, int] | None = None,
    convention: str = "zoo",
    images: Tensor | Iterable[Tensor] | None = None,
) -> Profile:
    """Count parameters, multiply-accumulates and tokens, as a rule without running the model.

    Args:
        model: A `ReducedViT`, a supported model, or one that something is attached to.
        img_size: Image size in pixels; None is the model's own.
        convention: "zoo" (see `zoo.cost.analytic`) or "diffrate": that paper's formula, which
            counts the patch embedding once for every prefix token too and leaves matching out.
        images: `(N, 3, H, W)`, or batches of them. A method that keeps a different number of tokens
            in every image is run on them, and the counts are means over them; without images they
            are upper limits. Costs of other methods do not depend on images.

    Raises:
        ZooError: If the convention is unknown or the image size does not fit.
    """
    if convention not in CONVENTIONS:
        raise ZooError(f"convention must be one of {CONVENTIONS}, got {convention!r}")
    wrapped = as_reduced(model)
    if images is not None and is_adaptive(wrapped):
        if convention != "zoo" or img_size is not None:
            raise ZooError(
                "a cost measured on images has their size and the convention 'zoo'; leave img_size "
                "and convention away"
            )
        return sample(wrapped, images)
    anatomy = wrapped.anatomy
    return counted(
        anatomy,
        wrapped.schedule,
        None if img_size is None else _grid(anatomy, img_size),
        convention,
        wrapped.runtime.last_block,
        params=sum(p.numel() for p in model.parameters()),
    )


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
