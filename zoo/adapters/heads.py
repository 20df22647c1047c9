"""Pooling and classifier for tokens of unequal size: an average weighs a token by its patches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from reduction.functional.attention import attention_bias
from reduction.tokens import Tokens
from zoo.adapters.attention import linear_weights
from zoo.errors import ZooError

#: `(model, x, weight) -> pooled`: tokens `(B, P+N, C)`, and weights `(B, N)` that add up to one.
Pool = Callable[[Any, Tensor, Tensor], Tensor]


_POOLS: dict[object, Pool] = {}
_HEADS: set[object] = set()


def register_head(cls: type[Any]) -> None:
    """Support a class whose `forward_head` is timm's usual one.

    That is: a pool by `global_pool`, `fc_norm`, `head_drop`, `head`.
    """
    _HEADS.add(cls.forward_head)  # type: ignore[attr-defined]


def usual_head(m: Any) -> bool:
    """Whether a model's `forward_head` was registered as a usual one."""
    return getattr(type(m), "forward_head", None) in _HEADS


def register_pool(cls: type[Any], pool: Pool) -> None:
    """Support a model class with a `pool` of its own: how it pools tokens of unequal size."""
    _POOLS[cls.pool] = pool


def first_pooled(m: Any, prefix: int) -> int:
    """The first token that pooling reads: prefix tokens take part where timm has them do so.

    Args:
        m: A backbone that does not read the class token alone.
        prefix: Number of prefix tokens.
    """
    # Eva's attention pooling reads all tokens; everything else leaves the prefix away by default.
    whole = getattr(m, "attn_pool", None) is not None and getattr(type(m), "pool", None) is Eva.pool
    return 0 if whole or getattr(m, "pool_include_prefix", False) else prefix


def mean_weight(size: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Share of each token in an average, `(B, N)`."""
    weight = size if mask is None else size * mask
    weight = weight.to(torch.promote_types(dtype, weight.dtype))
    return (weight / weight.sum(1, keepdim=True)).to(dtype)


def mean(t: Tokens, first: int = 0) -> Tensor:
    """Average of tokens from one on; each counts for the patches in it.

    Args:
        t: Tokens.
        first: The first one that takes part.
    """
    x = t.x[:, first:]
    if t.unit and t.mask is None and t.policy is None:
        return x.mean(dim=1)
    size = t.size[:, first:]
    if t.policy is not None:
        size = size * t.policy[:, first:]
    mask = None if t.mask is None else t.mask[:, first:]
    return (x * mean_weight(size, mask, x.dtype).unsqueeze(-1)).sum(1)


def weighs(m: Any) -> bool:
    """Whether `head` counts a token once for every patch in it; others read prefix tokens alone."""
    return m.global_pool not in ("token", "") and usual_head(m)


def head(m: Any, t: Tokens, pre_logits: bool = False) -> Tensor:
    """Pool, normalise and classify; averages weigh tokens by size.

    Args:
        m: The backbone.
        t: Tokens after the final norm.
        pre_logits: Stop before the classifier.
    """
    if (t.unit and t.mask is None) or not weighs(m):
        # Of the class: in the instance there may be one that leads here.
        return type(m).forward_head(m, t.x, pre_logits=pre_logits)
    kind = m.global_pool
    map_pool = getattr(m, "attn_pool", None)
    first = first_pooled(m, t.prefix)
    x = t.x[:, first:]
    size = t.size[:, first:]
    mask = None if t.mask is None else t.mask[:, first:]
    if kind == "prr":
        raise ZooError(
            "global_pool='prr' attends among all tokens and takes no sizes; it works with methods "
            "that only prune, or rebuild the model with global_pool='avg'"
        )
    own = _POOLS.get(getattr(type(m), "pool", None))
    if own is not None:
        pooled = own(m, t.x, mean_weight(size, mask, x.dtype))
    elif map_pool is not None:
        # Equal to counting a merged token once for every patch in it.
        bias = attention_bias(size, mask, x.dtype)
        pooled = map_pool(x, attn_mask=None if bias is None else bias.to(x.dtype))
    else:
        mean = (x * mean_weight(size, mask, x.dtype).unsqueeze(-1)).sum(1)
        if kind == "avg":
            pooled = mean
        else:
            top = x if mask is None else x.masked_fill(~mask.unsqueeze(-1), -torch.inf)
            peak = top.amax(1)
            pooled = peak if kind == "max" else 0.5 * (peak + mean)
    pooled = m.head_drop(m.fc_norm(pooled))
    return pooled if pre_logits else m.head(pooled)


def head_macs(m: Any, tokens: int) -> tuple[int, int]:
    """Linear and attention multiply-accumulates of pooling and classifier.

    Args:
        m: The backbone.
        tokens: What enters, prefix included.
    """
    linear = sum(
        linear_weights(getattr(m, name)) for name in ("head", "head_dist") if _has(m, name)
    )
    pool = getattr(m, "attn_pool", None)
    if pool is None:
        # Nothing is pooled for the empty word: every token is classified.
        whole = getattr(m, "global_pool", None) == ""
        return linear * (tokens if whole else 1), 0
    if not hasattr(pool, "kv"):
        width = int(m.embed_dim)
        return linear, 2 * tokens * tokens * width
    rows = pool.latent_len
    keys = tokens - first_pooled(m, int(m.num_prefix_tokens))
    linear += pool.kv.weight.numel() * keys
    for part in ("q", "proj", "mlp"):
        if isinstance(getattr(pool, part), nn.Module):
            linear += linear_weights(getattr(pool, part)) * rows
    width = pool.num_heads * pool.head_dim
    return linear, 2 * rows * keys * width


def _has(module: Any, name: str) -> bool:
    return isinstance(getattr(module, name, None), nn.Module)


register_head(VisionTransformer)
register_head(Eva)
