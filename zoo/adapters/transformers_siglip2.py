"""SigLIP 2's image tower of transformers, which takes patches, a mask of padding, and shapes.

Images of one batch must have one shape and no padding: reducers merge and rank tokens, and padding
is none. Images `(B, C, H, W)` are taken as well and cut into patches as the image processor does.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.siglip2 import modeling_siglip2 as siglip2

from zoo.adapters.blocks import register_block
from zoo.adapters.tower import Embedded, register_tower
from zoo.adapters.transformers_attention import register_hf_attention
from zoo.adapters.transformers_clip import PLAIN
from zoo.adapters.transformers_siglip import HfSiglip
from zoo.errors import ZooError


class HfSiglip2(HfSiglip):
    """`Siglip2VisionModel`."""

    title = "transformers SigLIP 2"
    any_size = True
    loops = {"encoder": siglip2.Siglip2Encoder}

    def grid(self, m: Any) -> tuple[int, int]:
        """See `Tower`, as for all others."""
        side = int(self.inner(m).embeddings.position_embedding_size)
        return side, side

    def input_size(self, m: Any) -> tuple[int, int, int]:
        """See `Tower`."""
        (rows, columns), (height, width) = self.grid(m), self.patch_size(m)
        return int(self.inner(m).config.num_channels), rows * height, columns * width

    def grid_of(self, m: Any, images: Tensor, **options: Any) -> tuple[int, int]:
        """See `Tower`."""
        if images.dim() == 4:
            return super().grid_of(m, images)
        shapes = options["spatial_shapes"]
        rows, columns = (int(side) for side in shapes[0])
        return rows, columns

    def check_images(self, m: Any, images: Tensor, **options: Any) -> None:
        """See `Tower`."""
        if images.dim() == 4:
            super().check_images(m, images, **options)
            return
        width = self.stem(m).in_features
        if images.dim() != 3 or images.shape[2] != width:
            raise ZooError(
                f"expected pixel_values of shape (B, patches, {width}), got {tuple(images.shape)}"
            )
        shapes, mask = options.get("spatial_shapes"), options.get("pixel_attention_mask")
        if not isinstance(shapes, Tensor) or shapes.shape != (images.shape[0], 2):
            raise ZooError("expected spatial_shapes of shape (B, 2), as the image processor has it")
        rows, columns = (int(side) for side in shapes[0])
        padded = mask is not None and not bool(mask.bool().all())
        if padded or rows * columns != images.shape[1] or bool((shapes != shapes[0]).any()):
            raise ZooError(
                "a reduced SigLIP 2 takes batches of one shape without padding: reducers merge and "
                "rank tokens, and padding is none; resize the images to one shape and give the "
                "processor max_num_patches=rows*columns, here "
                f"{rows}*{columns}={rows * columns}"
            )

    def embed(self, m: Any, images: Tensor, **options: Any) -> Embedded:
        """See `Tower`."""
        shapes = options.get("spatial_shapes")
        if images.dim() == 4:
            images, shapes = self._cut(m, images)
        return Embedded(self.inner(m).embeddings(images, shapes), None, False)

    def raster(self, m: Any, images: Tensor, grid: tuple[int, int], **options: Any) -> Tensor:
        """See `Tower`; of patches the images that they were cut from."""
        if images.dim() == 4:
            return super().raster(m, images, grid, **options)
        cut = images.unflatten(2, (*self.patch_size(m), -1)).unflatten(1, grid)
        return cut.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)

    def patches(self, m: Any, images: Tensor) -> Tensor:
        """See `Tower`."""
        return self.stem(m)(self.cast(m, self._cut(m, images)[0]))  # type: ignore[no-any-return]

    def positions(self, m: Any, grid: tuple[int, int]) -> Tensor:
        """See `Tower`. The same weights as in the model's own product."""
        e = self.inner(m).embeddings
        table = e.position_embedding.weight.unflatten(0, self.grid(m)).movedim(2, 0).unsqueeze(0)
        resized = F.interpolate(
            table.float(), grid, mode="bilinear", align_corners=False, antialias=True
        )
        return resized.flatten(2).transpose(1, 2).to(table.dtype)

    def position_macs(self, m: Any) -> int:
        """See `Tower`: the table of positions is resized by a product."""
        rows, columns = self.grid(m)
        return (rows * columns) ** 2 * self.width(m)

    def whole(self, m: Any, images: Tensor) -> Tensor:
        """See `Tower`."""
        patches, shapes = self._cut(m, images)
        answer = m(patches, torch.ones_like(patches[..., 0], dtype=torch.int64), shapes)
        return self._vector(m, answer)

    def _cut(self, m: Any, images: Tensor) -> tuple[Tensor, Tensor]:
        """Patches `(B, N, p * p * C)` of images, and their shapes `(B, 2)`."""
        (rows, columns), (height, width) = self.grid_of(m, images), self.patch_size(m)
        images = images[..., : rows * height, : columns * width]
        cut = images.unflatten(3, (columns, width)).unflatten(2, (rows, height))
        patches = cut.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
        shape = torch.tensor([[rows, columns]], device=images.device)
        return patches, shape.expand(images.shape[0], -1)


_OWN = ("pixel_attention_mask", "spatial_shapes")
register_tower(siglip2.Siglip2VisionModel, HfSiglip2("", _OWN))
register_tower(
    siglip2.Siglip2ForImageClassification,
    HfSiglip2("vision_model", (*_OWN, "labels"), passes_on=False),
)
register_hf_attention(siglip2.Siglip2Attention)
register_block(siglip2.Siglip2EncoderLayer, PLAIN)
