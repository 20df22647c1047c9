"""BEiT of transformers, whose attention adds a bias for how far apart two tokens are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers.models.beit import modeling_beit as beit

from reduction.tokens import Tokens
from zoo.adapters.attention import through
from zoo.adapters.bias import bias_of
from zoo.adapters.blocks import Attend, BlockAdapter, masked, register_block
from zoo.adapters.heads import mean
from zoo.adapters.tower import Embedded, register_tower
from zoo.adapters.transformers_attention import plain_forward, register_hf_attention
from zoo.adapters.transformers_tower import HfTower

_SHARED, _RESIZED, _PIXELS = "shared", "interpolate_pos_encoding", "resolution"


class HfBeit(HfTower):
    """`BeitModel`."""

    title = "transformers BEiT"
    embedding = ("bool_masked_pos",)
    any_size = True

    def embed(self, m: Any, images: Tensor, **options: Any) -> Embedded:
        """See `Tower`, as for all others."""
        inner, x = self.inner(m), super().embed(m, images, **options).x
        resized, pixels = bool(options.get(_RESIZED)), tuple(images.shape[2:])
        more: dict[str, Any] = {_RESIZED: resized, _PIXELS: pixels}
        if inner.shared_position_bias is not None:
            more[_SHARED] = _table(inner.shared_position_bias, more, inner.config.patch_size)
        return Embedded(x, None, False, more)

    def biased(self, m: Any) -> bool:
        """See `Tower`."""
        tables = (b.relative_position_bias for b in self.blocks(m))
        return self.inner(m).shared_position_bias is not None or any(t is not None for t in tables)

    def bias(
        self, m: Any, embedded: Embedded, block: int, t: Tokens, changed: bool
    ) -> Tensor | None:
        """See `Tower`."""
        b: Any = self.blocks(m)[block]
        full = embedded.more.get(_SHARED)
        if b.relative_position_bias is not None:
            own = _table(b.relative_position_bias, embedded.more, b.patch_size)
            full = own if full is None else own + full
        return None if full is None else bias_of(full[0], t, changed)

    def reads(self, m: Any) -> str:
        """See `Tower`."""
        return "patches" if self.inner(m).config.use_mean_pooling else "class"

    def pooled(self, m: Any, t: Tokens) -> Tensor | None:
        """See `HfTower`."""
        pooler = self.inner(m).pooler
        if pooler is None:
            return None
        return t.x[:, 0] if pooler.layernorm is None else pooler.layernorm(mean(t, 1))

    def feature(self, m: Any, t: Tokens) -> Tensor:
        """See `HfTower`."""
        pooled = self.pooled(m, t)
        return t.x[:, 0] if pooled is None else pooled

    def answer(
        self, m: Any, t: Tokens, last: Tensor, own: Tensor | None, options: Mapping[str, Any]
    ) -> Any:
        """See `HfTower`."""
        if self.part:
            return super().answer(m, t, last, own, options)
        return beit.BeitModelOutputWithPooling(
            last_hidden_state=last, pooler_output=self.pooled(m, t)
        )


def _table(layer: Any, more: Mapping[str, Any], patch: int) -> Tensor:
    """A bias among all tokens of the raster, `(1, H, 1+N0, 1+N0)`."""
    rows, columns = (side // patch for side in more[_PIXELS])
    return layer((rows, columns), more[_RESIZED], dim_size=rows * columns + 1)  # type: ignore[no-any-return]


def _attn(b: Any, x: Tensor, attend: Attend) -> tuple[Tensor, Any]:
    out, signals = attend(b.attention, b.layernorm_before(x))
    return through(b.drop_path, b.lambda_1 * through(b.dropout, out)), signals


def _mlp(b: Any, x: Tensor) -> Tensor:
    return through(b.drop_path, _branch(b, x)) + x


def _branch(b: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
    return b.lambda_2 * through(b.dropout, b.mlp(masked(b.layernorm_after(x), mask)))  # type: ignore[no-any-return]


def _call(block: Any, x: Tensor, extra: dict[str, Any]) -> Tensor:
    own = {name: extra[name] for name in (_RESIZED, _PIXELS)}
    return plain_forward(block)(x, attention_mask=extra.get(_SHARED), **own)  # type: ignore[no-any-return]


def _attention_of(b: Any) -> nn.Module:
    return b.attention  # type: ignore[no-any-return]


register_tower(
    beit.BeitModel, HfBeit("", ("bool_masked_pos", "interpolate_pos_encoding", "attention_mask"))
)
register_tower(
    beit.BeitForImageClassification,
    HfBeit("beit", ("labels", "interpolate_pos_encoding"), passes_on=False),
)
register_hf_attention(beit.BeitAttention)
register_block(
    beit.BeitLayer,
    BlockAdapter(
        _attn,
        _mlp,
        rope=False,
        attn_input=lambda block, x: block.layernorm_before(x),
        mlp_branch=_branch,
        mlp_masked=_branch,
        attn=_attention_of,
        mlp_drop=lambda block: block.drop_path,
        masks=False,
        call=_call,
    ),
)
