"""CLIP's image tower of transformers, alone, with its projection, and with a classifier."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers.models.clip import modeling_clip as clip

from reduction.tokens import Tokens
from zoo.adapters.blocks import Attend, BlockAdapter, masked, register_block
from zoo.adapters.heads import mean
from zoo.adapters.tower import register_tower
from zoo.adapters.transformers_attention import call_layer, register_hf_attention
from zoo.adapters.transformers_tower import HfTower


class HfClip(HfTower):
    """`CLIPVisionModel`. No norm stands behind its last block but that of the class token."""

    title = "transformers CLIP"
    embedding = ("interpolate_pos_encoding",)
    layers, last_norm = "encoder.layers", "post_layernorm"
    loops = {"encoder": clip.CLIPEncoder}

    def reads(self, m: Any) -> str:
        """See `Tower`, as for all others."""
        return "patches" if self.classifier(m) is not None else "class"

    def stem(self, m: Any) -> nn.Module:
        """See `Tower`."""
        return self.inner(m).embeddings.patch_embedding  # type: ignore[no-any-return]

    def pre_norm(self, m: Any, x: Tensor) -> Tensor:
        """See `Tower`."""
        return self.inner(m).pre_layrnorm(x)  # type: ignore[no-any-return]

    def norm(self, m: Any, x: Tensor) -> Tensor:
        """See `Tower`."""
        return x

    def norm_maps(self, m: Any, x: Tensor) -> Tensor:
        """See `Tower`."""
        return self.inner(m).post_layernorm(x)  # type: ignore[no-any-return]

    def pooled(self, m: Any, t: Tokens) -> Tensor | None:
        """See `HfTower`."""
        return self.inner(m).post_layernorm(t.x[:, 0])  # type: ignore[no-any-return]

    def feature(self, m: Any, t: Tokens) -> Tensor:
        """See `HfTower`."""
        if self.classifier(m) is not None:
            return mean(t, 1)
        return self.inner(m).post_layernorm(t.x[:, 0])  # type: ignore[no-any-return]


class HfClipProjection(HfClip):
    """`CLIPVisionModelWithProjection`: its answer is an embedding."""

    def leave(self, m: Any, t: Tokens, pre_logits: bool = False) -> Tensor:
        """See `Tower`."""
        x = self.feature(m, t)
        return x if pre_logits else m.visual_projection(x)

    def answer(
        self, m: Any, t: Tokens, last: Tensor, own: Tensor | None, options: Mapping[str, Any]
    ) -> Any:
        """See `HfTower`."""
        embeds = self.leave(m, t) if own is None else own
        return clip.CLIPVisionModelOutput(image_embeds=embeds, last_hidden_state=last)

    def heads(self, m: Any) -> list[nn.Module]:
        """See `HfTower`."""
        return [m.visual_projection]

    def features(self, m: Any) -> int:
        """See `Tower`."""
        return int(m.visual_projection.out_features)


def _attn(b: Any, x: Tensor, attend: Attend) -> tuple[Tensor, Any]:
    return attend(b.self_attn, b.layer_norm1(x))


def _mlp(b: Any, x: Tensor) -> Tensor:
    return x + _branch(b, x)


def _branch(b: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
    return b.mlp(masked(b.layer_norm2(x), mask))  # type: ignore[no-any-return]


#: The layer of CLIP and SigLIP.
PLAIN = BlockAdapter(
    _attn,
    _mlp,
    rope=False,
    attn_input=lambda block, x: block.layer_norm1(x),
    mlp_branch=_branch,
    mlp_masked=_branch,
    attn=lambda block: block.self_attn,
    mlp_drop=lambda block: None,
    call=call_layer,
)
register_hf_attention(clip.CLIPAttention)
register_block(clip.CLIPEncoderLayer, PLAIN)
_SIZE = "interpolate_pos_encoding"
register_tower(clip.CLIPVisionModel, HfClip("", (_SIZE,)))
register_tower(clip.CLIPVisionModelWithProjection, HfClipProjection("vision_model", (_SIZE,)))
register_tower(
    clip.CLIPForImageClassification, HfClip("vision_model", ("labels",), passes_on=False)
)
