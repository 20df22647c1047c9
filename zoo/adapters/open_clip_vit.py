"""OpenCLIP's own VisionTransformer: the image towers of ViT-B-32, ViT-L-14, ViT-H-14 and so on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.transformer import (
    Attention,
    AttentionalPooler,
    CustomResidualAttentionBlock,
    CustomTransformer,
    QuickGELU,
    ResidualAttentionBlock,
    Transformer,
    VisionTransformer,
)
from torch import Tensor, nn

from reduction.functional.attention import attention_bias
from reduction.tokens import Tokens
from zoo.adapters.attention import (
    Parts,
    Shift,
    linear_weights,
    register_attention,
    shifted,
    split_heads,
    through,
)
from zoo.adapters.blocks import Attend, BlockAdapter, masked, register_block
from zoo.adapters.heads import mean_weight
from zoo.adapters.timm_tower import of_projection, of_table
from zoo.adapters.torch_attention import why_not_plain
from zoo.adapters.tower import Embedded, Tower, register_tower
from zoo.errors import UnsupportedModel, ZooError


class OpenClipViT(Tower):
    """OpenCLIP's `VisionTransformer`."""

    title = "open_clip VisionTransformer"
    library = "open_clip"

    def check(self, m: Any) -> None:
        """See `Tower`, as for all others."""
        inner = m.transformer
        if type(inner).forward not in (Transformer.forward, CustomTransformer.forward):
            reason = f"its transformer is a {type(inner).__name__}, whose forward is not known"
        elif not inner.batch_first:
            reason = "its transformer takes the sequence first (batch_first=False)"
        else:
            reason = next(filter(None, map(_why_odd, inner.resblocks)), "")
        if reason:
            raise UnsupportedModel(f"an open_clip VisionTransformer that cannot be run: {reason}")

    def blocks(self, m: Any) -> Sequence[nn.Module]:
        """See `Tower`."""
        return m.transformer.resblocks  # type: ignore[no-any-return]

    def prefix(self, m: Any) -> int:
        """See `Tower`."""
        return 1

    def class_tokens(self, m: Any) -> int:
        """See `Tower`."""
        return 1

    def width(self, m: Any) -> int:
        """See `Tower`."""
        return int(m.transformer.width)

    def classes(self, m: Any) -> int:
        """See `Tower`: it answers with an embedding."""
        return 0

    def features(self, m: Any) -> int:
        """See `Tower`: the width of the embedding."""
        return int(self._pool_width(m) if m.proj is None else m.proj.shape[1])

    def _pool_width(self, m: Any) -> int:
        return self.width(m) if m.attn_pool is None else int(m.attn_pool.query.shape[1])

    def reads(self, m: Any) -> str:
        """See `Tower`."""
        return "class" if m.attn_pool is None and m.pool_type == "tok" else "patches"

    def why_all_tokens(self, m: Any) -> str:
        """See `Tower`."""
        if m.output_tokens:
            return "the tower puts out its tokens, too (output_tokens=True)"
        if m.attn_pool is not None:
            return "an attentional pooler attends to all tokens"
        if m.pool_type != "tok":
            return f"the embedding is made of all tokens (pool_type={m.pool_type!r})"
        return ""

    def grid(self, m: Any) -> tuple[int, int]:
        """See `Tower`."""
        rows, columns = m.grid_size
        return int(rows), int(columns)

    def patch_size(self, m: Any) -> tuple[int, int]:
        """See `Tower`."""
        height, width = m.patch_size
        return int(height), int(width)

    def grid_of(self, m: Any, images: Tensor) -> tuple[int, int]:
        """See `Tower`."""
        return self.grid(m)

    def input_size(self, m: Any) -> tuple[int, int, int]:
        """See `Tower`."""
        height, width = m.image_size
        return int(m.conv1.in_channels), int(height), int(width)

    def check_images(self, m: Any, images: Tensor) -> None:
        """See `Tower`."""
        channels, height, width = self.input_size(m)
        patches = tuple(s // p for s, p in zip(images.shape[-2:], m.patch_size, strict=True))
        if images.dim() != 4 or images.shape[1] != channels or patches != self.grid(m):
            raise ZooError(
                f"expected images of shape (B, {channels}, {height}, {width}), got "
                f"{tuple(images.shape)}; resize them, or build the model with "
                "force_image_size=(HEIGHT, WIDTH)"
            )

    def embed(self, m: Any, images: Tensor) -> Embedded:
        """See `Tower`."""
        x = m.conv1(images).flatten(2).permute(0, 2, 1)
        first = m.class_embedding.view(1, 1, -1).expand(x.shape[0], -1, -1).to(x.dtype)
        x = torch.cat([first, x], dim=1) + m.positional_embedding.to(x.dtype)
        return Embedded(through(m.patch_dropout, x), None, False)

    def why_one_piece(self, m: Any) -> str:
        """See `Tower`."""
        return ""

    def patches(self, m: Any, images: Tensor) -> Tensor:
        """See `Tower`."""
        return of_projection(m.conv1, images)

    def positions(self, m: Any, grid: tuple[int, int]) -> Tensor:
        """See `Tower`."""
        return of_table(m.positional_embedding.unsqueeze(0), self.grid(m), grid)

    def pre_norm(self, m: Any, x: Tensor) -> Tensor:
        """See `Tower`."""
        return through(m.ln_pre, x)

    def norm(self, m: Any, x: Tensor) -> Tensor:
        """See `Tower`: where the norm comes behind the pooling, tokens are left as they are."""
        return m.ln_post(x) if self._norm_first(m) else x  # type: ignore[no-any-return]

    def norm_maps(self, m: Any, x: Tensor) -> Tensor:
        """See `Tower`."""
        return m.ln_post(x)  # type: ignore[no-any-return]

    def _norm_first(self, m: Any) -> bool:
        if m.attn_pool is not None:
            return m.attn_pool_contrastive is not None
        return not m.final_ln_after_pool

    def settings(self, m: Any) -> dict[str, Any]:
        """See `Tower`."""
        return _settings(m)

    def stem(self, m: Any) -> nn.Module:
        """See `Tower`."""
        return m.conv1  # type: ignore[no-any-return]

    def head_macs(self, m: Any, tokens: int) -> tuple[int, int]:
        """See `Tower`."""
        linear = attention = 0
        rows = {"none": tokens}.get(m.pool_type, 1)
        if m.attn_pool is not None:
            linear, attention = _pooler_macs(m.attn_pool, tokens)
            rows = len(m.attn_pool.query) if m.pool_type == "none" else 1
            if m.attn_pool_contrastive is not None:
                cascade = m.attn_pool_type == "cascade"
                more = _pooler_macs(m.attn_pool_contrastive, rows if cascade else tokens)
                linear, attention, rows = linear + more[0], attention + more[1], 1
        return linear + (0 if m.proj is None else m.proj.numel() * rows), attention

    def class_embedding(self, m: Any) -> Tensor | None:
        """See `Tower`."""
        return m.class_embedding  # type: ignore[no-any-return]

    def places_prefix(self, m: Any) -> bool:
        """See `Tower`."""
        return True

    def after_blocks(self, m: Any) -> tuple[str, ...]:
        """See `Tower`."""
        return ("ln_post.", "proj", "attn_pool")

    def checkpointing(self, m: Any) -> bool:
        """See `Tower`."""
        return bool(m.transformer.grad_checkpointing)

    def set_checkpointing(self, m: Any, enable: bool) -> None:
        """See `Tower`."""
        m.set_grad_checkpointing(enable)

    def groups(self, m: Any, coarse: bool = False) -> dict[str, Any]:
        """See `Tower`."""
        return {
            "stem": r"^class_embedding|^positional_embedding|^conv1|^ln_pre",
            "blocks": [
                (r"^transformer\.resblocks\.(\d+)", None),
                (r"^ln_post|^attn_pool", (99999,)),
            ],
        }

    def weighs(self, m: Any) -> bool:
        """See `Tower`."""
        return m.attn_pool is not None or m.pool_type == "avg"

    def leave(self, m: Any, t: Tokens, pre_logits: bool = False) -> Any:
        """See `Tower`; with `output_tokens` the pair of the embedding and the tokens."""
        if m.attn_pool is None:
            pooled, tokens = _pooled(m, t)
            pooled = pooled if self._norm_first(m) else m.ln_post(pooled)
        else:
            pooled, tokens = _attended(m, t)
        if not (pre_logits or m.proj is None):
            pooled = pooled @ m.proj
        return (pooled, tokens) if m.output_tokens else pooled


def _why_odd(block: Any) -> str:
    """What about a block is not run here; empty if nothing."""
    if hasattr(block, "ln_1_kv"):
        return "a block attends to other tokens (is_cross_attention=True)"
    if isinstance(block.attn, nn.MultiheadAttention):
        return why_not_plain(block.attn)
    if getattr(block.attn, "scaled_cosine", False):
        return (
            "scaled cosine attention (scaled_cosine_attn=True), which open_clip cannot run either"
        )
    return ""


def _pooled(m: Any, t: Tokens) -> tuple[Tensor, Tensor]:
    """What `_global_pool` returns, where a token counts for all patches in it."""
    if m.pool_type != "avg" or (t.unit and t.mask is None):
        return m._global_pool(t.x)  # type: ignore[no-any-return]
    x, mask = t.x[:, 1:], None if t.mask is None else t.mask[:, 1:]
    return (x * mean_weight(t.size[:, 1:], mask, x.dtype).unsqueeze(-1)).sum(1), x


def _attended(m: Any, t: Tokens) -> tuple[Tensor, Tensor]:
    """What attentional poolers make of tokens."""
    bias = None if t.unit and t.mask is None else attention_bias(t.size, t.mask, t.x.dtype)
    tokens = _pool(m.attn_pool, t.x, bias)
    if m.attn_pool_contrastive is None:
        return m._global_pool(m.ln_post(tokens))  # type: ignore[no-any-return]
    if m.attn_pool_type == "parallel":
        return _pool(m.attn_pool_contrastive, t.x, bias), tokens
    return m.attn_pool_contrastive(tokens), tokens


def _pool(pooler: AttentionalPooler, x: Tensor, bias: Tensor | None) -> Tensor:
    """A pooler on tokens; a bias of their sizes makes each count for all patches in it."""
    if bias is None:
        return pooler(x)  # type: ignore[no-any-return]
    batch, n, _ = x.shape
    x = pooler.ln_k(x)
    q = pooler.ln_q(pooler.query).unsqueeze(0).expand(batch, -1, -1)
    mask = bias.to(x.dtype).expand(batch, pooler.attn.num_heads, q.shape[1], n).flatten(0, 1)
    return pooler.attn(q, x, x, need_weights=False, attn_mask=mask)[0]  # type: ignore[no-any-return]


def _pooler_macs(pooler: Any, tokens: int) -> tuple[int, int]:
    queries, width = pooler.query.shape
    context = pooler.ln_k.normalized_shape[0]
    linear = 2 * queries * width * width + 2 * tokens * context * width
    return linear, 2 * queries * tokens * width


def _settings(m: Any) -> dict[str, Any]:
    """What open_clip's own configurations say of a tower, read off a model."""
    inner, pool = m.transformer, m.attn_pool
    block = inner.resblocks[0]
    attn, hidden = block.attn, block.mlp.c_fc.out_features
    ratio = hidden / inner.width
    vision: dict[str, Any] = {
        "layers": len(inner.resblocks),
        "width": int(inner.width),
        "head_width": int(inner.width) // int(attn.num_heads),
        "mlp_ratio": ratio if int(inner.width * ratio) == hidden else (hidden + 0.5) / inner.width,
        "patch_size": _side(m.patch_size),
        "image_size": _side(m.image_size),
        "ls_init_value": None if isinstance(block.ls_1, nn.Identity) else 1e-5,
        "patch_dropout": float(getattr(m.patch_dropout, "prob", 0.0)),
        "no_ln_pre": isinstance(m.ln_pre, nn.Identity),
        "pos_embed_type": "learnable" if m.positional_embedding.requires_grad else "sin_cos_2d",
        "final_ln_after_pool": bool(m.final_ln_after_pool),
        "pool_type": str(m.pool_type),
        "output_tokens": bool(m.output_tokens),
        "norm_kwargs": {"eps": float(m.ln_post.eps)},
    }
    if pool is not None:
        vision |= {
            "attentional_pool": m.attn_pool_type or True,
            "attn_pooler_queries": len(pool.query),
            "attn_pooler_heads": int(pool.attn.num_heads),
        }
    if isinstance(block, CustomResidualAttentionBlock):
        vision |= {
            "block_type": "custom",
            "qk_norm": not isinstance(attn.ln_q, nn.Identity),
            "scale_heads": attn.head_scale is not None,
            "scale_attn_inner": not isinstance(attn.ln_inner, nn.Identity),
            "scale_attn": not isinstance(block.ln_attn, nn.Identity),
            "scale_fc": not isinstance(block.mlp.ln, nn.Identity),
        }
    quick = isinstance(block.mlp.gelu, QuickGELU)
    return {"embed_dim": int(m.output_dim), "quick_gelu": quick, "vision_cfg": vision}


def _side(size: Sequence[int]) -> int | list[int]:
    height, width = size
    return int(height) if height == width else [int(height), int(width)]


def _project(attn: Any, x: Tensor, shift: Shift | None = None) -> tuple[Tensor, Tensor, Tensor]:
    packed = shifted(F.linear(x, attn.in_proj_weight, attn.in_proj_bias), x, shift)
    q, k, v = (split_heads(part, attn.num_heads) for part in packed.chunk(3, dim=-1))
    return attn.ln_q(q), attn.ln_k(k), v


def _parts(attn: Any) -> Parts:
    return Parts(
        heads=attn.num_heads,
        head_dim=attn.head_dim,
        width=attn.out_proj.out_features,
        scale=attn.scale,
        dropout=attn.attn_drop.p,
        drop=attn.attn_drop,
        fused=attn.use_fsdpa,
        norm=_inner(attn),
        proj=lambda x: through(attn.out_drop, attn.out_proj(x)),
    )


def _inner(attn: Any) -> Callable[[Tensor], Tensor]:
    if attn.head_scale is None:
        return partial(through, attn.ln_inner)

    def scaled(x: Tensor) -> Tensor:
        heads = x.unflatten(-1, (attn.num_heads, attn.head_dim))
        return attn.ln_inner((heads * attn.head_scale.flatten(1)).flatten(-2))  # type: ignore[no-any-return]

    return scaled


def _weights(attn: Any) -> tuple[int, int]:
    return linear_weights(attn.out_proj), attn.in_proj_weight.numel()


def _attn(b: Any, x: Tensor, attend: Attend) -> tuple[Tensor, Any]:
    out, signals = attend(b.attn, b.ln_1(x))
    return through(b.ls_1, out), signals


def _custom_attn(b: Any, x: Tensor, attend: Attend) -> tuple[Tensor, Any]:
    out, signals = attend(b.attn, b.ln_1(x))
    return through(b.ls_1, through(b.ln_attn, out)), signals


def _mlp(b: Any, x: Tensor) -> Tensor:
    return x + _branch(b, x)


def _branch(b: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
    return through(b.ls_2, b.mlp(masked(b.ln_2(x), mask)))


def _normed(b: Any, x: Tensor) -> Tensor:
    return b.ln_1(x)  # type: ignore[no-any-return]


_BLOCK = BlockAdapter(
    _attn,
    _mlp,
    rope=False,
    attn_input=_normed,
    mlp_branch=_branch,
    mlp_masked=_branch,
    mlp_drop=lambda block: None,
    masks=False,
)
register_tower(VisionTransformer, OpenClipViT())
register_attention(Attention, _project, parts=_parts, weights=_weights)
register_block(ResidualAttentionBlock, _BLOCK)
register_block(CustomResidualAttentionBlock, _BLOCK._replace(attn_branch=_custom_attn))
