"""Layers of DualToken-ViT: its block, what that is made of, and what joins neighbours."""

from __future__ import annotations

import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from reduction.counts import BlockCost


class Attention(nn.Module):
    """Multi-head attention from some tokens to others."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.kv, self.proj = (
            nn.Linear(dim, dim),
            nn.Linear(dim, 2 * dim),
            nn.Linear(dim, dim),
        )

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """From `x` `(B, N, C)` to `context` `(B, M, C)`."""
        q = self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv(context).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out = scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def mlp(dim: int, ratio: float) -> nn.Sequential:
    """Two linear layers over channels."""
    hidden = int(dim * ratio)
    return nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))


class LocalBlock(nn.Module):
    """ConvNeXt's block on a map `(B, C, H, W)`."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm, self.mlp = nn.LayerNorm(dim), mlp(dim, 4.0)

    def forward(self, x: Tensor) -> Tensor:
        """Add what it finds."""
        y = self.mlp(self.norm(self.conv(x).permute(0, 2, 3, 1)))
        return x + y.permute(0, 3, 1, 2)


class BiDim(nn.Module):
    """LightViT's gates: of channels by their means, of places by those and their own channels."""

    def __init__(self, dim: int, reduction: float = 0.25) -> None:
        super().__init__()
        hidden = max(1, int(dim * reduction))
        self.reduce, self.channels = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.local, self.places = nn.Linear(dim, hidden), nn.Linear(2 * hidden, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Scale tokens `(B, N, C)`."""
        whole = torch.nn.functional.gelu(self.reduce(x.mean(1, keepdim=True)))
        local = torch.nn.functional.gelu(self.local(x))
        places = self.places(torch.cat([whole.expand_as(local), local], -1)).sigmoid()
        return x * self.channels(whole).sigmoid() * places


class DualTokenBlock(nn.Module):
    """Local tokens by convolution, global ones by attention on a small map, both fused.

    Args:
        dim: C.
        heads: Of both attentions.
        ratio: Hidden width of the last MLP over C.
        halvings: Steps of two from this map to that of the global tokens.
    """

    def __init__(self, dim: int, heads: int, ratio: float, halvings: int) -> None:
        super().__init__()
        self.local = LocalBlock(dim)
        self.down = nn.Sequential(
            *(
                layer
                for _ in range(halvings)
                for layer in (
                    nn.Conv2d(dim, dim, 3, padding=1, groups=dim),
                    nn.Conv2d(dim, dim, 2, stride=2, groups=dim),
                )
            )
        )
        self.norm_down, self.gather = nn.LayerNorm(dim), Attention(dim, heads)
        self.share = nn.Parameter(torch.tensor([0.5, 0.5]))
        self.norm_mix, self.mix = nn.LayerNorm(dim), mlp(dim, 2.0)
        self.norm_local, self.spread = nn.LayerNorm(dim), Attention(dim, heads)
        self.norm, self.mlp, self.gate = nn.LayerNorm(dim), mlp(dim, ratio), BiDim(dim)

    def forward(self, x: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """From a map `(B, C, H, W)` and global tokens `(B, G, C)` to both again."""
        local = self.local(x)
        small = self.norm_down(self.down(local).flatten(2).transpose(1, 2))
        found = self.gather(small, small)
        mixed = self.share[0] * found + self.share[1] * tokens
        tokens = mixed + self.mix(self.norm_mix(mixed))
        y = local.flatten(2).transpose(1, 2)
        y = y + self.spread(self.norm_local(y), tokens)
        y = y + self.gate(self.mlp(self.norm(y)))
        return y.transpose(1, 2).reshape(x.shape), tokens

    def macs(self, n: int, g: int, linear: int) -> BlockCost:
        """Cost for `n` local and `g` global tokens; `linear` is that of its layers."""
        dim = self.norm.normalized_shape[0]
        ffn = n * sum(m.weight.numel() for m in self.mlp if isinstance(m, nn.Linear))
        return BlockCost(n + g, n + g, n + g, linear - ffn, 2 * (g * g + n * g) * dim, ffn, 0)


class MergePatches(nn.Module):
    """LightViT's residual merging: 2x2 cells side by side through a layer, plus their maximum."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.norm, self.proj = LayerNorm2d(4 * dim), nn.Conv2d(4 * dim, out, 1, bias=False)
        self.pool, self.skip = nn.MaxPool2d(2), nn.Conv2d(dim, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Halve a map in both directions."""
        side = torch.nn.functional.pixel_unshuffle(x, 2)
        return self.proj(self.norm(side)) + self.skip(self.pool(x))  # type: ignore[no-any-return]
