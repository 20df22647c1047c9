"""The state that travels through the blocks, and what a block's attention can tell a reducer.

Shapes: B batch, P prefix tokens (class, distillation, registers), N reducible tokens now,
N0 reducible tokens at the start, C width, H heads, d head width.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from reduction.eager import traced

NO_MEMORY: Mapping[str, Tensor] = MappingProxyType({})


class Tokens(NamedTuple):
    """Tokens and their bookkeeping: an immutable pytree, passed on and never stored.

    Attributes:
        x: Features `(B, P+N, C)`, prefix tokens first.
        size: How many input patches each token stands for, `(B, P+N)`. Always float32:
            bfloat16 cannot hold 257.
        prefix: P, the number of leading tokens that no reducer touches.
        unit: True while every size is one, so that attention needs no size bias. Known without
            looking at the data.
        origin: Input patch that gives a token its position, `(B, N)` int64; -1 where a token has
            none. None when nobody asked for it.
        source: Slot in `[0, N)` that now holds each input patch, `(B, N0)` int64; -1 where it was
            dropped. None when nobody asked for it.
        policy: Differentiable keep mask `(B, P+N)` while a method trains with masks.
        mask: False marks padding, `(B, P+N)` bool, for methods that keep a different number of
            tokens per image. None when there is no padding.
        memory: What a reducer remembers from block to block within one forward pass.
        grid: Rows and columns of the raster in which the reducible tokens lie now, row-major;
            tokens that a plugin appended stand behind it and are not counted. None once a
            reduction has broken the raster, or where nobody said what it is. A method that keeps
            a raster sets it itself.
    """

    x: Tensor
    size: Tensor
    prefix: int
    unit: bool = True
    origin: Tensor | None = None
    source: Tensor | None = None
    policy: Tensor | None = None
    mask: Tensor | None = None
    memory: Mapping[str, Tensor] = NO_MEMORY
    grid: tuple[int, int] | None = None

    @property
    def n(self) -> int:
        """Number of reducible tokens N, a plain int also where a tracer makes tensors of shapes."""
        n = self.x.shape[1] - self.prefix
        return int(n) if isinstance(n, Tensor) else n

    @property
    def patches(self) -> Tensor:
        """Features of the reducible tokens `(B, N, C)`, a view."""
        return self.x[:, self.prefix :]

    @property
    def patch_size(self) -> Tensor:
        """Sizes of the reducible tokens `(B, N)`, a view."""
        return self.size[:, self.prefix :]

    @classmethod
    def start(
        cls, x: Tensor, prefix: int, track: bool = False, grid: tuple[int, int] | None = None
    ) -> Tokens:
        """State before the first block: every token stands for itself.

        Args:
            x: Embedded tokens `(B, P+N, C)`.
            prefix: Number of prefix tokens P.
            track: Also keep `origin` and `source`.
            grid: Patch grid `(rows, columns)`.
        """
        batch, length = x.shape[:2]
        # One number for all: sizes are never written into, and most never change.
        size = torch.ones(1, 1, dtype=torch.float32, device=x.device).expand(batch, length)
        origin = source = None
        if track:
            origin = torch.arange(length - prefix, device=x.device).expand(batch, -1)
            source = origin
        return cls(x, size, prefix, origin=origin, source=source, grid=grid)


class Signals(NamedTuple):
    """What one block's attention can tell; only the fields that a reducer needs are filled.

    Attributes:
        k: Keys `(B, H, P+N, d)` after key normalisation and before rotary embedding.
        v: Values `(B, H, P+N, d)`.
        cls_row: Attention that the class token pays, `(B, H, P+N)`, after the softmax; the mean
            over rows where several tokens act as one class token (Jumbo).
        column: Attention that each token receives, averaged over heads and queries, `(B, P+N)`.
        attn: The whole map `(B, H, P+N, P+N)`; asking for it gives up fused attention.
        x_norm: Input of the attention after its layer norm, `(B, P+N, C)`.
        out: Output of the attention before its projection, `(B, H, P+N, d)`.
        x_in: The residual stream that entered the block's attention, `(B, P+N, C)`.
        x_mid: The residual stream between attention and MLP, `(B, P+N, C)`; at site "post" only.
        mlp: What the MLP adds to it, layer scale included, `(B, P+N, C)`; at site "post" only.
    """

    k: Tensor | None = None
    v: Tensor | None = None
    cls_row: Tensor | None = None
    column: Tensor | None = None
    attn: Tensor | None = None
    x_norm: Tensor | None = None
    out: Tensor | None = None
    x_in: Tensor | None = None
    x_mid: Tensor | None = None
    mlp: Tensor | None = None

    def need(self, name: str) -> Tensor:
        """A signal that must be there, because `Reducer.needs` names it.

        Raises:
            ValueError: If it is not.
        """
        value: Tensor | None = getattr(self, name)
        if value is None:
            raise ValueError(f"expected the signal {name!r}; name it in the reducer's `needs`")
        return value


SIGNALS = frozenset(Signals._fields)
#: Those that are known only behind the MLP, of which blocks must have one.
OF_THE_MLP = frozenset({"x_mid", "mlp"})


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """Gather rows: `x[b, index[b, m]]`.

    Flat `index_select` is several times faster on a CPU than `gather` with an expanded index.

    Args:
        x: `(B, N)` or `(B, N, C)`.
        index: `(B, M)` int64, or `(M,)` when all images take the same rows.

    Returns:
        `(B, M)` or `(B, M, C)`.
    """
    if index.dim() == 1:
        return x.index_select(1, index)
    if x.dim() == 2:
        return x.gather(1, index)
    batch, n, width = x.shape
    rows = x.reshape(batch * n, width).index_select(0, flat_rows(index, n))
    return rows.view(batch, index.shape[1], width)


def flat_rows(index: Tensor, n: int) -> Tensor:
    """Rows `(B, M)` of images with n rows each as rows `(B * M,)` of all images together."""
    if index.shape[0] == 1 and not traced():  # A tracer would fix the size of the batch.
        return index.reshape(-1)
    start = torch.arange(index.shape[0], device=index.device).unsqueeze(1) * n
    return (index + start).reshape(-1)
