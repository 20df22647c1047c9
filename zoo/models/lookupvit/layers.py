"""The parts of a LookupViT: resizing a grid of tokens, and the block with its two streams."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import ceil
from typing import Any, NamedTuple, cast

import torch
from timm.layers import DropPath, Mlp
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from reduction.counts import BlockCost
from zoo.errors import ZooError

#: LayerNorm as in JAX's ViTs.
Norm = partial(nn.LayerNorm, eps=1e-6)
PLACEMENTS = ("post", "pre")


class Streams(NamedTuple):
    """The two streams after the last block.

    Attributes:
        lookup: Tokens on the patch grid, `(B, N, D)`.
        compressed: Tokens on the compressed grid, `(B, M, D)`.
    """

    lookup: Tensor
    compressed: Tensor


def as_tokens(x: Tensor) -> Tensor:
    """A map `(B, C, h, w)` as tokens `(B, N, C)`."""
    return x.flatten(2).transpose(1, 2)


def as_map(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Tokens `(B, N, C)` as a map `(B, C, *grid)`."""
    return x.transpose(1, 2).unflatten(2, grid).contiguous()


def chosen_blocks(indices: int | Sequence[int] | None, depth: int) -> list[int]:
    """Numbers of blocks; an int means the last so many, None all.

    Raises:
        ZooError: There is no such block.
    """
    if indices is None or isinstance(indices, int):
        indices = range(depth - (depth if indices is None else indices), depth)
    if not indices or any(not -depth <= i < depth for i in indices):
        raise ZooError(f"indices must name some of the {depth} blocks, got {indices}")
    return [i % depth for i in indices]


def resize_matrix(
    n: int, m: int, device: torch.device | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Weights `(m, n)` of the antialiased bilinear resize of `n` samples to `m`.

    With `s = n / m` and `support = max(s, 1)` the weight of sample `j` for output `i` is
    `max(0, 1 - |j + 0.5 - (i + 0.5) s| / support)`, rows normalised to 1. It is what
    `F.interpolate(mode="bilinear", antialias=True, align_corners=False)` does along one axis.
    """
    scale = n / m
    centre = (torch.arange(m, device=device, dtype=dtype) + 0.5) * scale
    sample = torch.arange(n, device=device, dtype=dtype) + 0.5
    weight = (1 - (sample - centre[:, None]).abs() / max(scale, 1.0)).clamp_min(0)
    return weight / weight.sum(1, keepdim=True)


def _resize_axis(x: Tensor, m: int, axis: int) -> Tensor:
    """Resize one of the last two axes; the matrix is banded, and only its band is multiplied.

    Interpolation is elementwise work then, as everywhere else, and no matrix product.
    """
    n = x.shape[axis]
    if m == n:
        return x
    matrix = resize_matrix(n, m, x.device, x.dtype)
    width = min(n, ceil(2 * max(n / m, 1.0)) + 1)
    first = (matrix > 0).int().argmax(1).clamp_max(n - width)
    index = first[:, None] + torch.arange(width, device=x.device)
    weight = matrix.gather(1, index)
    band = x.index_select(axis, index.flatten()).unflatten(axis, (m, width))
    if axis == -1:
        return (band * weight).sum(-1)
    return (band * weight[:, :, None]).sum(-2)


def resize_grid(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Resize a map `(B, C, h, w)` to `(B, C, *grid)`, bilinear with antialiasing.

    It has no parameters, is linear in `x`, keeps constants, and is the identity on equal grids.
    """
    dtype = x.dtype
    x = x.to(torch.promote_types(dtype, torch.float32))
    return _resize_axis(_resize_axis(x, grid[0], -2), grid[1], -1).to(dtype)


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


class Gather(nn.Module):
    """Compressed tokens read from lookup tokens.

    `A = softmax(LN(Wq zc) LN(Wk zl)^T / sqrt(d))` per head, then `Wo (A V)` with `V = Wv zl`. The
    norms act on the full width after the projections ("post"), or on the inputs before them
    ("pre"), where V then reads the normalised lookup tokens too.

    Args:
        dim: Width D.
        num_heads: Heads H.
        placement: "post" or "pre".
        attn_drop: Dropout of the weights that gather; the weights handed on are those before it.
        proj_drop: Dropout of the output.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        placement: str = "post",
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_heads, self.placement = num_heads, placement
        self.scale = (dim // num_heads) ** -0.5
        self.q, self.k, self.v = (nn.Linear(dim, dim) for _ in range(3))
        self.q_norm, self.k_norm = Norm(dim), Norm(dim)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj, self.proj_drop = nn.Linear(dim, dim), nn.Dropout(proj_drop)

    def forward(self, lookup: Tensor, compressed: Tensor) -> tuple[Tensor, Tensor]:
        """Return the update of `compressed` `(B, M, D)` and the weights A `(B, H, M, N)`."""
        if self.placement == "post":
            q, k = self.q_norm(self.q(compressed)), self.k_norm(self.k(lookup))
        else:
            lookup = self.k_norm(lookup)
            q, k = self.q(self.q_norm(compressed)), self.k(lookup)
        v = self.v(lookup)
        q, k, v = (_heads(x, self.num_heads) for x in (q, k, v))
        logits = (q * self.scale) @ k.transpose(-2, -1)
        # bfloat16 and float16 are too coarse for sums over some hundred tokens.
        wide = torch.promote_types(logits.dtype, torch.float32)
        attn = logits.softmax(-1, dtype=wide).to(v.dtype)
        out = (self.attn_drop(attn) @ v).transpose(1, 2).flatten(2)
        return self.proj_drop(self.proj(out)), attn


class Infuse(nn.Module):
    """Lookup tokens read from refined compressed tokens with the gather's own weights.

    `Wi (A^T U)` with `U = LN(Wu zc)` ("post") or `U = Wu LN(zc)` ("pre"). A is the softmax of the
    gather, transposed: neither computed again nor normalised over the compressed tokens.

    Args:
        dim: Width D.
        num_heads: Heads H.
        placement: "post" or "pre".
        renormalise: Divide by the sums over compressed tokens; for ablations.
        proj_drop: Dropout of the output.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        placement: str = "post",
        renormalise: bool = False,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_heads, self.placement, self.renormalise = num_heads, placement, renormalise
        self.v, self.norm = nn.Linear(dim, dim), Norm(dim)
        self.proj, self.proj_drop = nn.Linear(dim, dim), nn.Dropout(proj_drop)

    def forward(self, compressed: Tensor, attn: Tensor) -> Tensor:
        """Return the update of the lookup tokens `(B, N, D)`; `attn` is `(B, H, M, N)`."""
        post = self.placement == "post"
        value = self.norm(self.v(compressed)) if post else self.v(self.norm(compressed))
        if self.renormalise:
            attn = attn / attn.sum(-2, keepdim=True)
        # LayerNorm answers in float32 under autocast; A is in the type of the products.
        value = _heads(value, self.num_heads).to(attn.dtype)
        out = (attn.transpose(-2, -1) @ value).transpose(1, 2).flatten(2)
        return self.proj_drop(self.proj(out))


class LookupBlock(nn.Module):
    """Gather, refine, infuse, lookup MLP.

    Args:
        dim: Width D of both streams.
        num_heads: Heads of the cross and of the self attention.
        mlp_ratio: Hidden width of the compressed tokens' MLP over D (the paper's p).
        lookup_mlp_ratio: Hidden width of the lookup tokens' MLP over D (the paper's 1/q).
        placement: Where the norms of the cross attention are, "post" or "pre" the projections.
        renormalise: See `Infuse`.
        proj_drop: Dropout of every output.
        attn_drop: Dropout of attention weights.
        drop_path: Probability of dropping each of the five residual branches, per image.

    Raises:
        ZooError: The heads do not divide the width, or `placement` is unknown.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        lookup_mlp_ratio: float = 0.5,
        placement: str = "post",
        renormalise: bool = False,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ZooError(f"embed_dim must be a multiple of num_heads, got {dim} and {num_heads}")
        if placement not in PLACEMENTS:
            raise ZooError(f"norm_placement must be one of {PLACEMENTS}, got {placement!r}")
        self.gather = Gather(dim, num_heads, placement, attn_drop, proj_drop)
        self.refine = Block(
            dim,
            num_heads,
            mlp_ratio,
            qkv_bias=True,
            proj_drop=proj_drop,
            attn_drop=attn_drop,
            drop_path=drop_path,
            norm_layer=cast(Any, Norm),
        )
        self.infuse = Infuse(dim, num_heads, placement, renormalise, proj_drop)
        self.lookup_norm = Norm(dim)
        self.lookup_mlp = Mlp(dim, int(dim * lookup_mlp_ratio), drop=proj_drop)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(
        self, lookup: Tensor, compressed: Tensor, look: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Update lookup tokens `(B, N, D)` and compressed tokens `(B, M, D)`.

        Args:
            lookup: Lookup tokens.
            compressed: Compressed tokens.
            look: Also update the lookup tokens; nobody reads those of the last block when only
                the compressed head answers.
        """
        update, attn = self.gather(lookup, compressed)
        compressed = self.refine(compressed + self.drop_path(update))
        if look:
            lookup = lookup + self.drop_path(self.infuse(compressed, attn))
            lookup = lookup + self.drop_path(self.lookup_mlp(self.lookup_norm(lookup)))
        return lookup, compressed

    def macs(self, n: int, m: int, look: bool = True) -> BlockCost:
        """Multiply-accumulates for `n` lookup and `m` compressed tokens."""
        dim = self.lookup_norm.normalized_shape[0]
        refine, look_mlp = cast(Any, self.refine.mlp.fc1), cast(Any, self.lookup_mlp.fc1)
        square = dim * dim
        linear = (2 * m + 2 * n + 4 * m) * square
        attention = 2 * n * m * dim + 2 * m * m * dim
        mlp = 2 * m * dim * refine.out_features
        if look:
            linear += (m + n) * square
            attention += n * m * dim
            mlp += 2 * n * dim * look_mlp.out_features
        return BlockCost(n + m, m, n + m, linear, attention, mlp, 0)
