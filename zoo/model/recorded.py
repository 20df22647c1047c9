"""What is said to those who record a pass, so that no recording is wrong in silence."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.errors import ZooError


def for_tracers(images: Tensor) -> Tensor:
    """The same images, of which a recording by `torch.jit` will take no other size.

    `torch.export` sees to that by itself.

    Args:
        images: `(B, 3, H, W)`.

    Raises:
        ZooError: If the old exporter to ONNX is at work, which loses some of the operations.
    """
    if torch.compiler.is_compiling() or not torch.jit.is_tracing():  # type: ignore[no-untyped-call]
        return images
    if torch.onnx.is_in_onnx_export():
        raise ZooError(
            "torch.onnx.export with dynamo=False writes models that answer something else; use "
            "dynamo=True, which is the default since torch 2.9"
        )
    # The counts of tokens are those of this size; nothing else would tell of another one.
    return images.expand(-1, *map(int, images.shape[1:]))
