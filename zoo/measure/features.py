"""One vector per image: what enters a classifier, or the answer of a model without one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from zoo.errors import ZooError
from zoo.measure.device import like_weights
from zoo.measure.growing import Growing
from zoo.model.answers import check_finite


class Features(NamedTuple):
    """Vectors of images.

    Attributes:
        x: `(N, C)`, float32.
        labels: Classes `(N,)`, -1 where there is none.
        places: Of the images in their data, `(N,)`.
    """

    x: Tensor
    labels: Tensor
    places: Tensor


class Embedder(nn.Module):
    """A model that gives one vector per image, as timm pools them.

    Args:
        model: Has timm's `forward_features` and `forward_head`.
        answer: Give what the model answers, behind its classifier or projection, instead of what
            enters it.
    """

    def __init__(self, model: nn.Module, answer: bool = False) -> None:
        super().__init__()
        # Without a classifier the answer is the features, in every library.
        self.model, self.answer = model, answer or getattr(model, "num_classes", None) == 0

    def forward(self, images: Tensor) -> Tensor:
        """Vectors `(B, C)` of images `(B, 3, H, W)`."""
        model: Any = self.model
        if self.answer:
            return model(images)  # type: ignore[no-any-return]
        return model.forward_head(model.forward_features(images), pre_logits=True)  # type: ignore[no-any-return]


@torch.inference_mode()
def collect(
    embed: nn.Module,
    batches: Iterable[Sequence[Tensor]],
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    limit: int | None = None,
    who: str = "the model",
    name: Callable[[int], str | None] | None = None,
) -> Features:
    """Vectors of all images.

    Args:
        embed: See `Embedder`.
        batches: Images `(B, 3, H, W)`, labels `(B,)`, and places `(B,)`; without places images are
            counted as they come.
        device: Where to run.
        dtype: Precision of autocast.
        limit: Stop after so many images.
        who: Whose features they are, for messages.
        name: What an image is called, by its place, for messages.

    Returns:
        On the CPU.

    Raises:
        NotFinite: A vector holds NaN or infinity.
        ZooError: The model gives more than one vector per image.
    """
    embed = embed.to(device).eval()
    vectors, classes, where = Growing(), Growing(), Growing()
    total = 0
    for images, labels, *rest in batches:
        if limit is not None:
            images, labels = images[: limit - total], labels[: limit - total]
        places = rest[0] if rest else torch.arange(total, total + len(labels))
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            found = embed(like_weights(images, embed, device))
        if found.ndim != 2:
            raise ZooError(
                "these tasks compare one vector per image, and this model gives "
                f"{tuple(found.shape[1:])}; pool its tokens, e.g. +backbone.args.global_pool=avg"
            )
        check_finite(found, places, who, name)
        vectors.add(found.float())
        classes.add(torch.as_tensor(labels).long())
        where.add(places[: len(labels)])
        total += len(labels)
        if limit is not None and total >= limit:
            break
    if not total:
        none = torch.zeros(0, dtype=torch.long)
        return Features(torch.zeros(0, 0), none, none)
    return Features(vectors.tensor(), classes.tensor(), where.tensor())
