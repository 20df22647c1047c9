"""DINOv2 of transformers, with registers and without."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.dinov2 import modeling_dinov2 as plain
from transformers.models.dinov2_with_registers import modeling_dinov2_with_registers as registers

from reduction.tokens import Tokens
from zoo.adapters.attention import through
from zoo.adapters.blocks import Attend, BlockAdapter, masked, register_block
from zoo.adapters.heads import mean
from zoo.adapters.tower import register_tower
from zoo.adapters.transformers_attention import call_layer, register_hf_attention
from zoo.adapters.transformers_tower import HfTower


class HfDinov2(HfTower):
    """`Dinov2Model`. Its classifier reads the class token beside the mean of the patches."""

    title = "transformers DINOv2"
    embedding = ("bool_masked_pos",)
    any_size = True
    layers = "encoder.layer"
    loops = {"encoder": plain.Dinov2Encoder}

    def reads(self, m: Any) -> str:
        """See `Tower`, as for all others."""
        return "patches" if self.part else "class"

    def pooled(self, m: Any, t: Tokens) -> Tensor | None:
        """See `HfTower`."""
        return t.x[:, 0]

    def feature(self, m: Any, t: Tokens) -> Tensor:
        """See `HfTower`."""
        if not self.part:
            return t.x[:, 0]
        return torch.cat([t.x[:, 0], mean(t, self.prefix(m))], dim=1)

    def features(self, m: Any) -> int:
        """See `Tower`."""
        return self.width(m) * (2 if self.part else 1)


class HfDinov2Registers(HfDinov2):
    """`Dinov2WithRegistersModel`."""

    title = "transformers DINOv2 with registers"
    loops = {"encoder": registers.Dinov2WithRegistersEncoder}

    def prefix(self, m: Any) -> int:
        """See `Tower`."""
        return 1 + int(self.inner(m).config.num_register_tokens)


def attn_half(b: Any, x: Tensor, attend: Attend) -> tuple[Tensor, Any]:
    """Attention half of a layer with layer scale and drop path."""
    out, signals = attend(b.attention, b.norm1(x))
    return _dropped(b, b.layer_scale1(out)), signals


def mlp_half(b: Any, x: Tensor) -> Tensor:
    """The other half."""
    return _dropped(b, mlp_branch(b, x)) + x


def mlp_branch(b: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """What the other half adds."""
    return b.layer_scale2(b.mlp(masked(b.norm2(x), mask)))  # type: ignore[no-any-return]


def _dropped(b: Any, x: Tensor) -> Tensor:
    return through(b.drop_path, x)


def attention_of(b: Any) -> nn.Module:
    """The attention of a layer."""
    return b.attention  # type: ignore[no-any-return]


def drop_of(b: Any) -> nn.Module:
    """What branches go through on their way into the stream."""
    return b.drop_path  # type: ignore[no-any-return]


_LAYER = BlockAdapter(
    attn_half,
    mlp_half,
    rope=False,
    mlp_branch=mlp_branch,
    mlp_masked=mlp_branch,
    attn=attention_of,
    mlp_drop=drop_of,
    call=call_layer,
)
for attention, layer in (
    (plain.Dinov2Attention, plain.Dinov2Layer),
    (registers.Dinov2WithRegistersAttention, registers.Dinov2WithRegistersLayer),
):
    register_hf_attention(attention)
    register_block(layer, _LAYER)

_OWN, _AROUND = ("bool_masked_pos", "attention_mask"), ("labels", "attention_mask")
register_tower(plain.Dinov2Model, HfDinov2("", _OWN))
register_tower(plain.Dinov2ForImageClassification, HfDinov2("dinov2", _AROUND))
register_tower(registers.Dinov2WithRegistersModel, HfDinov2Registers("", _OWN))
register_tower(
    registers.Dinov2WithRegistersForImageClassification,
    HfDinov2Registers("dinov2_with_registers", _AROUND),
)
