"""Batches of images of several sizes: those of one size run together, each as it would alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.adapters.tower import Sized
from zoo.errors import ZooError
from zoo.model.empty import first_of, taken
from zoo.model.features import knowing, known

_F = TypeVar("_F", bound=Callable[..., Any])


def for_any_sizes(method: _F) -> _F:
    """Let a method that takes images `(B, C, H, W)` take a batch of several sizes, too.

    It answers as for one, in the order of the batch. Tokens and features are padded with zeros.
    """
    first = first_of(method)

    @wraps(method)
    def whole(self: Any, *args: Any, **kwargs: Any) -> Any:
        images, args = taken(first, args, kwargs)
        if isinstance(images, Tensor):
            return method(self, images, *args, **kwargs)
        parts = self.tower.by_size(self.backbone, images)
        if method.__name__ == "forward":
            told = kwargs.get("return_info") or (args and args[0])
            if told and len(parts) > 1:
                raise ZooError(several_rasters(parts))
            if not told and self.unchanged([p.images for p in parts]):
                return self.tower.whole(self.backbone, images)
        return joined([method(self, p.images, *args, **kwargs) for p in parts], parts)

    return whole  # type: ignore[return-value]  # wraps keeps the signature, which mypy cannot see


def several_rasters(parts: Sequence[Sized]) -> str:
    """Why one `Info` cannot tell of images of several sizes."""
    return (
        "return_info tells of tokens over one raster, and these images have "
        f"{len(parts)} sizes; call the model with one size at a time"
    )


def joined(answers: Sequence[Any], parts: Sequence[Sized], length: int = 0) -> Any:
    """What was answered for every size, as one answer in the order of the batch.

    Args:
        answers: One for each size.
        parts: The sizes.
        length: Tokens and features are padded to so many rows at least.
    """
    first = answers[0]
    if isinstance(first, Tensor):
        return first if len(answers) == 1 and not length else _stacked(answers, parts, length)
    if isinstance(first, Mapping):
        return {name: joined([a[name] for a in answers], parts, length) for name in first}
    if first is None or (len(answers) == 1 and not length):
        return first
    items = zip(*answers, strict=True)
    return type(first)(joined(list(item), parts, length) for item in items)


def _stacked(answers: Sequence[Tensor], parts: Sequence[Sized], length: int) -> Tensor:
    order = torch.cat([p.places for p in parts]).argsort()
    if answers[0].dim() != 3:
        return torch.cat(list(answers)).index_select(0, order)
    longest = max(length, *(x.shape[1] for x in answers))
    padded = [F.pad(x, (0, 0, 0, longest - x.shape[1])) for x in answers]
    # No head could tell zeros from tokens, not even that of a dense model.
    rows = [
        {"places": p.places, "length": x.shape[1], "known": known(x)}
        for p, x in zip(parts, answers, strict=True)
    ]
    return knowing(torch.cat(padded).index_select(0, order), {"parts": rows})


def by_features(head: Callable[..., Tensor], x: Tensor, sizes: Tensor | None = None) -> Tensor:
    """What a head makes of features; of those of several sizes, of each without its padding.

    Args:
        head: Takes features `(B, P+M, C)`, and `sizes=`.
        x: Features.
        sizes: Patches in each token, `(B, P+M)`, where `x` does not bring them along.
    """
    rows = (known(x) or {}).get("parts")
    if rows is None:
        return head(x, sizes=sizes)

    def own(whole: Tensor, part: Mapping[str, Any]) -> Tensor:
        return whole.index_select(0, part["places"])[:, : part["length"]]

    answers = [
        head(knowing(own(x, p), p["known"]), sizes=None if sizes is None else own(sizes, p))
        for p in rows
    ]
    return joined(answers, [Sized(p["places"], x) for p in rows])  # type: ignore[no-any-return]
