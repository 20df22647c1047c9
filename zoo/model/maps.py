"""Attention as it happened: the weights of every block over the tokens that were there."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reduction.tokens import Tokens
from zoo.errors import ZooError
from zoo.model.attached import as_reduced
from zoo.model.empty import for_any_batch
from zoo.model.reduced import ReducedViT
from zoo.model.stream import flow


class AttentionMap(NamedTuple):
    """Attention of one block.

    Attributes:
        weights: `(B, H, Q, K)` after the softmax: what each token pays to each, prefix tokens
            first. Q and K differ only where a method removes tokens inside the attention or adds
            keys to it; keys that it adds stand last.
        source: Token that stands for each input patch, `(B, N0)`, counted among the K behind the
            prefix; -1 where the patch was dropped.
        prefix: Number of prefix tokens P.
        grid: Patch grid `(rows, columns)`.
    """

    weights: Tensor
    source: Tensor
    prefix: int
    grid: tuple[int, int]

    def on_patches(self, query: int = 0) -> Tensor:
        """What one token pays to every input patch, `(B, H, rows, columns)`.

        The patches of a merged token share its weight evenly; dropped ones get nothing. So all
        patches together get what the token pays to tokens behind the prefix.

        Args:
            query: Row of `weights`: 0 is the class token of a model that has one.
        """
        # One token more, without weight, which stands for what was dropped: it may be all there is.
        row = F.pad(self.weights[:, :, query, self.prefix :], (0, 1))
        place = torch.where(self.source < 0, row.shape[2] - 1, self.source)
        members = place.new_zeros(row.shape[0], row.shape[2])
        members = members.scatter_add(1, place, torch.ones_like(place))
        share = row / members.clamp_min(1).unsqueeze(1)
        index = place.unsqueeze(1).expand(-1, row.shape[1], -1)
        return share.gather(2, index).unflatten(2, self.grid)


def attention_maps(
    model: nn.Module, images: Tensor, queries: int | None = None
) -> list[AttentionMap]:
    """The attention of every block, over the tokens that are there when it happens.

    The pass is the one that `model(images)` makes, by the plain kernel that computes the weights
    one by one: equal to rounding. Memory grows with the square of the tokens; wrap the call in
    `torch.no_grad()` unless gradients are wanted.

    Args:
        model: A `ReducedViT`, or a supported timm model.
        images: `(B, 3, H, W)`.
        queries: Keep the weights of the first so many tokens alone, which spares the memory of the
            others: 1 is the class token of a model that has one. None keeps all.

    Returns:
        One map per block, in order.

    Raises:
        UnsupportedModel: If the model cannot be run block by block.
        ZooError: If the images do not fit, or a method does not show its attention.

    Examples:
        >>> import torch, zoo
        >>> model = zoo.load("vit_digits", reducer="tome")
        >>> maps = zoo.attention_maps(model, torch.zeros(1, 1, 16, 16))
        >>> maps[3].weights.shape  # (B, H, tokens, tokens)
        torch.Size([1, 4, 45, 45])
        >>> maps[3].on_patches().shape  # attention of the class token on the image
        torch.Size([1, 4, 8, 8])
    """
    if queries is not None and queries < 1:
        raise ZooError(f"queries must be a number of tokens from 1, or None, got {queries!r}")
    return _maps(as_reduced(model), images, queries)


@for_any_batch
def _maps(model: ReducedViT, images: Tensor, queries: int | None = None) -> list[AttentionMap]:
    model.checked(images, {"zoo.attention_maps": True})
    found: list[tuple[Tokens, Tensor]] = []

    def watch(block: int, t: Tokens, weights: Tensor) -> None:
        found.append((t, weights if queries is None else weights[:, :, :queries].clone()))

    grid = flow(model, images, track=True, watch=watch).info.grid
    maps = []
    for t, weights in found:
        assert t.source is not None
        maps.append(AttentionMap(weights, t.source, t.prefix, grid))
    return maps
