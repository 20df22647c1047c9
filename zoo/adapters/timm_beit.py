"""timm's Beit: BEiT and BEiT v2, whose attention adds a bias for how far apart two tokens are."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.models.beit import Attention, Beit, Block
from torch import Tensor

from reduction.tokens import Tokens
from zoo.adapters.attention import Shift, register_attention, shifted, unpack
from zoo.adapters.bias import bias_of
from zoo.adapters.blocks import BlockAdapter, register_block
from zoo.adapters.heads import register_head
from zoo.adapters.timm_eva import attn_half, mlp_branch, mlp_half
from zoo.adapters.timm_tower import TimmTower
from zoo.adapters.tower import Embedded, register_tower

_SHARED = "shared_rel_pos_bias"


class TimmBeit(TimmTower):
    """timm's `Beit`."""

    title = "timm Beit"

    def embed(self, m: Any, images: Tensor) -> Embedded:
        """See `Tower`."""
        x = m.patch_embed(images)
        x = torch.cat((m.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        if m.pos_embed is not None:
            x = x + m.pos_embed
        more = {} if m.rel_pos_bias is None else {_SHARED: m.rel_pos_bias()}
        return Embedded(m.pos_drop(x), None, False, more)

    def biased(self, m: Any) -> bool:
        """See `Tower`."""
        tables = (b.attn.relative_position_bias_table for b in m.blocks)
        return m.rel_pos_bias is not None or any(table is not None for table in tables)

    def bias(
        self, m: Any, embedded: Embedded, block: int, t: Tokens, changed: bool
    ) -> Tensor | None:
        """See `Tower`."""
        attn, shared = m.blocks[block].attn, embedded.more.get(_SHARED)
        if attn.relative_position_bias_table is None:
            return None if shared is None else bias_of(shared, t, changed)
        own = attn._get_rel_pos_bias()[0]
        return bias_of(own if shared is None else own + shared, t, changed)


def _attention(attn: Any, x: Tensor, shift: Shift | None = None) -> tuple[Tensor, Tensor, Tensor]:
    if attn.q_bias is None:
        qkv = attn.qkv(x)
    else:
        bias = torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
        if attn.qkv_bias_separate:
            qkv = attn.qkv(x) + bias
        else:
            qkv = F.linear(x, weight=attn.qkv.weight, bias=bias)
    return unpack(shifted(qkv, x, shift), attn.num_heads)


register_tower(Beit, TimmBeit())
register_head(Beit)
register_attention(Attention, _attention)
register_block(
    Block,
    BlockAdapter(
        attn_half,
        mlp_half,
        rope=False,
        mlp_branch=mlp_branch,
        mlp_masked=mlp_branch,
        masks=False,
    ),
)
