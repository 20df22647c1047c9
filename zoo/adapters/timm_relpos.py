"""timm's VisionTransformerRelPos: a bias for relative positions, of a table or a small network."""

from __future__ import annotations

from typing import Any

import torch
from timm.models.vision_transformer_relpos import (
    RelPosAttention,
    RelPosBlock,
    ResPostRelPosBlock,
    VisionTransformerRelPos,
)
from torch import Tensor

from reduction.tokens import Tokens
from zoo.adapters.attention import linear_weights, register_attention
from zoo.adapters.bias import bias_of
from zoo.adapters.blocks import BlockAdapter, register_block
from zoo.adapters.heads import register_head
from zoo.adapters.timm_tower import TimmTower
from zoo.adapters.timm_vit import (
    attention,
    attn_half,
    itself,
    mlp_branch,
    mlp_half,
    post_attn,
    post_branch,
    post_mlp,
)
from zoo.adapters.tower import Embedded, register_tower

_SHARED = "shared_rel_pos"


class TimmRelPos(TimmTower):
    """timm's `VisionTransformerRelPos`."""

    title = "timm VisionTransformerRelPos"

    def embed(self, m: Any, images: Tensor) -> Embedded:
        """See `Tower`."""
        x = m.patch_embed(images)
        if m.cls_token is not None:
            x = torch.cat((m.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        more = {} if m.shared_rel_pos is None else {_SHARED: m.shared_rel_pos.get_bias()}
        return Embedded(x, None, False, more)

    def biased(self, m: Any) -> bool:
        """See `Tower`."""
        return any(part is not None for part in _parts(m))

    def bias(
        self, m: Any, embedded: Embedded, block: int, t: Tokens, changed: bool
    ) -> Tensor | None:
        """See `Tower`."""
        own = m.blocks[block].attn.rel_pos
        full = embedded.more.get(_SHARED) if own is None else own.get_bias()
        return None if full is None else bias_of(full[0], t, changed)

    def position_macs(self, m: Any) -> int:
        """See `Tower`: of every distance there is, by the network that has one."""
        rows, columns = m.patch_embed.grid_size
        distances = (2 * rows - 1) * (2 * columns - 1)
        parts = [part for part in _parts(m) if part is not None]
        return distances * sum(map(linear_weights, parts))


def _weights(attn: Any) -> tuple[int, int]:
    """Of the projections; the network of positions sees no token."""
    return linear_weights(attn.proj), linear_weights(attn.qkv)


def _parts(m: Any) -> list[Any]:
    """What makes the biases: one for all blocks, or one for each."""
    return [m.shared_rel_pos, *(b.attn.rel_pos for b in m.blocks)]


register_tower(VisionTransformerRelPos, TimmRelPos())
register_head(VisionTransformerRelPos)
register_attention(RelPosAttention, attention, separable=True, weights=_weights)
register_block(
    RelPosBlock,
    BlockAdapter(
        attn_half,
        mlp_half,
        rope=False,
        mlp_branch=mlp_branch,
        mlp_masked=mlp_branch,
        masks=False,
    ),
)
register_block(
    ResPostRelPosBlock,
    BlockAdapter(
        post_attn,
        post_mlp,
        rope=False,
        attn_input=itself,
        mlp_branch=post_branch,
        mlp_masked=post_branch,
        masks=False,
    ),
)
