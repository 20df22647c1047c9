"""Backbones that run themselves on a raster of patches, which shrinks from stage to stage."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zoo.adapters.timm_tower import TimmTower
from zoo.errors import ZooError


class RasterTower(TimmTower):
    """A model without `patch_embed` and prefix tokens. Subclasses say how large the raster is."""

    #: Pixels that one cell of the first raster stands for, in each direction.
    stride: int = 4

    def prefix(self, m: Any) -> int:
        """See `Tower`, as for all others."""
        return 0

    def class_tokens(self, m: Any) -> int:
        """See `Tower`."""
        return 0

    def width(self, m: Any) -> int:
        """See `Tower`."""
        return int(m.num_features)

    def reads(self, m: Any) -> str:
        """See `Tower`."""
        return "patches"

    def patch_size(self, m: Any) -> tuple[int, int]:
        """See `Tower`."""
        return self.stride, self.stride

    def grid_of(self, m: Any, images: Tensor) -> tuple[int, int]:
        """See `Tower`."""
        return images.shape[-2] // self.stride, images.shape[-1] // self.stride

    def input_size(self, m: Any) -> tuple[int, int, int]:
        """See `Tower`."""
        rows, columns = self.grid(m)
        return int(m.in_chans), self.stride * rows, self.stride * columns

    def check_images(self, m: Any, images: Tensor) -> None:
        """See `Tower`; rasters are made for one size."""
        wanted = self.input_size(m)
        if images.dim() != 4 or images.shape[1:] != wanted:
            raise ZooError(
                f"expected images of shape (B, {', '.join(map(str, wanted))}), got "
                f"{tuple(images.shape)}; another size is given to the model: img_size=(H, W)"
            )

    def stem(self, m: Any) -> nn.Module:
        """See `Tower`."""
        return m.stem  # type: ignore[no-any-return]

    def after_blocks(self, m: Any) -> tuple[str, ...]:
        """See `Tower`."""
        return ("head.",)


def layer_macs(model: nn.Module, size: Sequence[int]) -> dict[str, int]:
    """Multiply-accumulates of every convolution and linear layer for one image, by its name.

    Args:
        model: A copy of it runs without data.
        size: `(channels, height, width)` of the image.
    """
    ghost = copy.deepcopy(model).to("meta").eval()
    found: dict[str, int] = {}
    for name, module in ghost.named_modules():
        module._forward_hooks.clear()  # nobody shall see the copy
        module._forward_pre_hooks.clear()
        if isinstance(module, nn.Conv2d | nn.Linear):

            def note(layer: Any, _: Any, out: Tensor, name: str = name) -> None:
                found[name] = found.get(name, 0) + out.numel() * layer.weight[0].numel()

            module.register_forward_hook(note)
    with torch.no_grad():
        ghost(torch.empty(1, *size, device="meta"))
    return found
