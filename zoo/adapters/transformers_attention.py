"""Layers of the vision transformers of Hugging Face, and their attention."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from zoo.adapters.attention import (
    Calling,
    Parts,
    Shift,
    linear_weights,
    register_attention,
)


def _project(attn: Any, x: Tensor, shift: Shift | None = None) -> tuple[Tensor, Tensor, Tensor]:
    heads = x.shape[0], x.shape[1], -1, attn.head_dim
    q, k, v = attn.q_proj(x), attn.k_proj(x), attn.v_proj(x)
    if shift is not None:
        more_q, more_v = shift(x)
        q, v = q + more_q.to(q.dtype), v + more_v.to(v.dtype)
    return tuple(y.view(heads).transpose(1, 2) for y in (q, k, v))  # type: ignore[return-value]


def _parts(attn: Any) -> Parts:
    names = attn.__dict__
    out = attn._modules.get("o_proj") or attn._modules["out_proj"]
    dropout = names["attention_dropout"] if "attention_dropout" in names else names["dropout"]
    return Parts(
        heads=names["num_attention_heads"]
        if "num_attention_heads" in names
        else names["num_heads"],
        head_dim=attn.head_dim,
        width=out.out_features,
        scale=names["scaling"] if "scaling" in names else names["scale"],
        dropout=dropout,
        drop=None,
        fused=attn.config._attn_implementation == "sdpa",
        norm=None,
        proj=out,
        rotate_half=True,
    )


def _weights(attn: Any) -> tuple[int, int]:
    out = attn._modules.get("o_proj") or attn._modules["out_proj"]
    return out.weight.numel(), linear_weights(attn) - out.weight.numel()


def register_hf_attention(cls: type[nn.Module]) -> None:
    """Support an attention of `q_proj`, `k_proj`, `v_proj` and an output projection."""
    register_attention(
        cls,
        _project,
        separable=True,
        parts=_parts,
        weights=_weights,
        calling=Calling(lambda x: (x,), lambda out: (out, None)),
    )


def call_layer(block: Any, x: Tensor, extra: dict[str, Any]) -> Tensor:
    """How transformers calls a layer: sizes are a mask that is added."""
    return plain_forward(block)(x, extra.get("attn_mask"))  # type: ignore[no-any-return]


def plain_forward(block: Any) -> Any:
    """A layer without its own gradient checkpointing, which the wrapper sees to."""
    owner = block if isinstance(block, nn.Module) else getattr(block, "__self__", None)
    if owner is None or not (getattr(owner, "gradient_checkpointing", False) and owner.training):
        return block
    bare = getattr(type(owner).forward, "__wrapped__", None)
    return block if bare is None else bare.__get__(owner)
