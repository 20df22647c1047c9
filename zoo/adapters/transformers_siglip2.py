"""SigLIP 2's image tower of transformers, which takes patches, a mask of padding, and shapes.

Of a batch of several shapes, images of one shape run together without their padding: no padded
token is there that could be kept, merged or attended to, and every image gets the tokens that it
gets alone. Images `(B, C, H, W)` are taken as well and cut into patches as the processor does them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.siglip2 import modeling_siglip2 as siglip2

from reduction.eager import exporting, traced
from zoo.adapters.blocks import register_block
from zoo.adapters.tower import Embedded, Sized, register_tower
from zoo.adapters.transformers_attention import register_hf_attention
from zoo.adapters.transformers_clip import PLAIN
from zoo.adapters.transformers_siglip import HfSiglip
from zoo.errors import ZooError

_PADDED = (
    "a batch with padding cannot be compiled or recorded; do that with images (B, C, H, W), or "
    "with patches of one shape"
)


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
        shapes = self._shapes(m, images, options)
        rows, columns = (int(side) for side in shapes[0])
        if rows * columns != images.shape[1] or bool((shapes != shapes[0]).any()):
            raise ZooError(
                "expected pixel_attention_mask beside patches of several shapes or with padding, "
                f"as the image processor has it: {images.shape[1]} patches, and shapes such as "
                f"{rows}x{columns}"
            )

    def _shapes(self, m: Any, images: Tensor, options: Mapping[str, Any]) -> Tensor:
        """Rows and columns `(B, 2)` of images that came as patches.

        Raises:
            ZooError: If these are none, or nothing says in which raster they are.
        """
        width = self.stem(m).in_features
        if images.dim() != 3 or images.shape[2] != width:
            raise ZooError(
                f"expected pixel_values of shape (B, patches, {width}), got {tuple(images.shape)}"
            )
        shapes = options.get("spatial_shapes")
        if not isinstance(shapes, Tensor) or shapes.shape != (images.shape[0], 2):
            raise ZooError("expected spatial_shapes of shape (B, 2), as the image processor has it")
        return shapes

    def several(self, m: Any, images: Tensor, options: Mapping[str, Any]) -> Sequence[Sized]:
        """See `HfTower`: of patches beside which a mask leaves some out, or of several shapes."""
        mask = options.get("pixel_attention_mask")
        if images.dim() == 4 or mask is None:
            return ()
        if traced():  # there are no numbers to look at, but whoever runs it will have some
            torch._assert_async(mask.bool().all(), _PADDED)
            return ()
        shapes = self._shapes(m, images, options).cpu()
        if not isinstance(mask, Tensor) or mask.shape != images.shape[:2]:
            raise ZooError(
                f"expected pixel_attention_mask of shape {tuple(images.shape[:2])}, one number for "
                f"each patch, got {tuple(getattr(mask, 'shape', ())) or type(mask).__name__}"
            )
        real = mask.bool().cpu()
        alike = bool(len(shapes)) and bool((shapes == shapes[0]).all())
        if alike and bool(real.all()) and int(shapes[0].prod()) == images.shape[1]:
            return ()
        wanted = torch.arange(images.shape[1]) < shapes.prod(1, keepdim=True)
        for i, count in enumerate(shapes.prod(1).tolist()):
            if not 0 < count <= images.shape[1] or not torch.equal(real[i], wanted[i]):
                rows, columns = shapes[i].tolist()
                raise ZooError(
                    f"image {i} of the batch: expected its {rows}x{columns} patches, as "
                    "spatial_shapes says, and padding behind them; pixel_attention_mask has "
                    f"{int(real[i].sum())} of {images.shape[1]}"
                )
        found = []
        for shape in dict.fromkeys(map(tuple, shapes.tolist())):
            places = (shapes == torch.tensor(shape)).all(1).nonzero()[:, 0].to(images.device)
            cut = images.index_select(0, places)[:, : shape[0] * shape[1]]
            found.append(Sized(places, self.raster(m, cut, shape)))
        if not found:
            found.append(Sized(shapes[:, 0], images.new_zeros(0, *self.input_size(m))))
        return found

    def by_size(self, m: Any, given: Any) -> Sequence[Sized]:
        """See `Tower`: a mapping as the image processor makes it."""
        if not isinstance(given, Mapping) or not isinstance(given.get("pixel_values"), Tensor):
            return super().by_size(m, given)
        images = given["pixel_values"]
        if images.dim() == 4:
            return [Sized(torch.arange(len(images), device=images.device), images)]
        options = {k: v for k, v in given.items() if k != "pixel_values"}
        if found := self.several(m, images, options):
            return found
        self.check_images(m, images, **options)
        every = torch.arange(len(images), device=images.device)
        return [Sized(every, self.raster(m, images, self.grid_of(m, images, **options)))]

    def embed(self, m: Any, images: Tensor, **options: Any) -> Embedded:
        """See `Tower`."""
        shapes = options.get("spatial_shapes")
        if images.dim() == 4:
            if exporting():
                # The model's own asks of its shapes what no exporter has an operator for.
                x = self.patches(m, images) + self.positions(m, self.grid_of(m, images))
                return Embedded(x, None, False)
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
        if isinstance(images, Mapping):
            names = ("pixel_values", "pixel_attention_mask", "spatial_shapes")
            return self._vector(m, m(**{name: images[name] for name in names if name in images}))
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
