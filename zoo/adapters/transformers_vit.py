"""ViT, DeiT, I-JEPA and MAE of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.deit import modeling_deit as deit
from transformers.models.ijepa import modeling_ijepa as ijepa
from transformers.models.vit import modeling_vit as vit
from transformers.models.vit_mae import modeling_vit_mae as mae

from reduction.tokens import Tokens
from zoo.adapters.attention import through
from zoo.adapters.blocks import Attend, BlockAdapter, masked, register_block
from zoo.adapters.heads import mean
from zoo.adapters.tower import Embedded, register_tower
from zoo.adapters.transformers_attention import call_layer, register_hf_attention
from zoo.adapters.transformers_tower import HfTower
from zoo.errors import UnsupportedModel, ZooError


class HfViT(HfTower):
    """`ViTModel` and what is built around it."""

    title = "transformers ViT"


class HfDeiT(HfTower):
    """`DeiTModel`, with its distillation token."""

    title = "transformers DeiT"

    def prefix(self, m: Any) -> int:
        """See `Tower`, as for all others."""
        return 2


class HfTaught(HfDeiT):
    """DeiT with a classifier for each of its two prefix tokens."""

    def classifier(self, m: Any) -> Any:
        """See `Tower`."""
        return m.cls_classifier, m.distillation_classifier

    def classes(self, m: Any) -> int:
        """See `Tower`."""
        return int(getattr(m.cls_classifier, "out_features", 0))

    def features(self, m: Any) -> int:
        """See `Tower`."""
        return self.width(m)

    def heads(self, m: Any) -> list[nn.Module]:
        """See `HfTower`."""
        return list(self.classifier(m))

    def reset_classifier(self, m: Any, classes: int, pool: str | None = None) -> None:
        """See `Tower`."""
        m.cls_classifier = self.fresh(m, self.width(m), classes)
        m.distillation_classifier = self.fresh(m, self.width(m), classes)
        m.num_labels = classes
        if classes:
            m.config.num_labels = classes

    def leave(self, m: Any, t: Tokens, pre_logits: bool = False) -> Tensor:
        """See `Tower`."""
        if pre_logits:
            return (t.x[:, 0] + t.x[:, 1]) / 2
        return (m.cls_classifier(t.x[:, 0]) + m.distillation_classifier(t.x[:, 1])) / 2

    def answer(
        self, m: Any, t: Tokens, last: Tensor, own: Tensor | None, options: Mapping[str, Any]
    ) -> Any:
        """See `HfTower`."""
        first, second = m.cls_classifier(t.x[:, 0]), m.distillation_classifier(t.x[:, 1])
        logits = (first + second) / 2 if own is None else own
        return deit.DeiTForImageClassificationWithTeacherOutput(
            logits=logits, cls_logits=first, distillation_logits=second
        )


class HfIJepa(HfTower):
    """`IJepaModel`, which has no class token."""

    title = "transformers I-JEPA"

    def prefix(self, m: Any) -> int:
        """See `Tower`."""
        return 0

    def class_tokens(self, m: Any) -> int:
        """See `Tower`."""
        return 0

    def reads(self, m: Any) -> str:
        """See `Tower`."""
        return "patches"

    def feature(self, m: Any, t: Tokens) -> Tensor:
        """See `HfTower`."""
        pooled = None if self.part else self.pooled(m, t)
        return mean(t) if pooled is None else pooled


class HfMae(HfTower):
    """`ViTMAEModel`, of which every patch is looked at."""

    title = "transformers ViTMAE"
    embedding = ("interpolate_pos_encoding",)

    def check(self, m: Any) -> None:
        """See `Tower`."""
        super().check(m)
        ratio = m.config.mask_ratio
        if ratio:
            raise UnsupportedModel(
                f"a {type(m).__name__} with mask_ratio={ratio} throws that share of the patches "
                "away at random in every pass, in evaluation mode too; type "
                "model.config.mask_ratio = 0 and wrap it then"
            )

    def embed(self, m: Any, images: Tensor, **options: Any) -> Embedded:
        """See `Tower`. Without noise of this order the model would shuffle its patches."""
        order = self._in_place(m, images)
        noise = options.get("noise")
        if noise is not None and not bool((noise.argsort(1) == order).all()):
            raise ZooError(
                "noise shuffles the patches, and a reduced model has to know where they are; leave "
                "noise out, or give torch.arange(patches).expand(batch, -1)"
            )
        if m.config.mask_ratio:
            self.check(m)
        given = {k: v for k, v in options.items() if k in self.embedding and v is not None}
        x, _, _ = m.embeddings(self.cast(m, images), noise=order, **given)
        return Embedded(x, None, False)

    def _in_place(self, m: Any, images: Tensor) -> Any:
        rows, columns = self.grid_of(m, images)
        order = torch.arange(rows * columns, device=images.device, dtype=torch.float32)
        return order.expand(images.shape[0], -1)

    def whole(self, m: Any, images: Tensor) -> Tensor:
        """See `Tower`."""
        return m(images, noise=self._in_place(m, images)).last_hidden_state[:, 0]  # type: ignore[no-any-return]

    def answer(
        self, m: Any, t: Tokens, last: Tensor, own: Tensor | None, options: Mapping[str, Any]
    ) -> Any:
        """See `HfTower`."""
        order: Any = self._in_place(m, options["pixel_values"])
        nothing: Any = torch.zeros_like(order)
        return mae.ViTMAEModelOutput(last_hidden_state=last, mask=nothing, ids_restore=order.long())

    def pooled(self, m: Any, t: Tokens) -> Tensor | None:
        """See `HfTower`."""
        return None


def _attn(b: Any, x: Tensor, attend: Attend) -> tuple[Tensor, Any]:
    out, signals = attend(b.attention, b.layernorm_before(x))
    return through(b._modules["dropout"], out) if "dropout" in b._modules else out, signals


def _mlp(b: Any, x: Tensor) -> Tensor:
    out = _branch(b, x)
    return (through(b._modules["dropout"], out) if "dropout" in b._modules else out) + x


def _branch(b: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
    return b.mlp(masked(b.layernorm_after(x), mask))  # type: ignore[no-any-return]


_PLAIN = BlockAdapter(
    _attn,
    _mlp,
    rope=False,
    attn_input=lambda block, x: block.layernorm_before(x),
    mlp_branch=_branch,
    mlp_masked=_branch,
    attn=lambda block: block.attention,
    mlp_drop=lambda block: block._modules.get("dropout"),
    call=call_layer,
)
for attention, layer in (
    (vit.ViTAttention, vit.ViTLayer),
    (deit.DeiTAttention, deit.DeiTLayer),
    (ijepa.IJepaAttention, ijepa.IJepaLayer),
    (mae.ViTMAEAttention, mae.ViTMAELayer),
):
    register_hf_attention(attention)
    register_block(layer, _PLAIN)

_OWN = ("bool_masked_pos", "interpolate_pos_encoding", "attention_mask")
_AROUND = ("labels", "interpolate_pos_encoding", "attention_mask")
register_tower(vit.ViTModel, HfViT("", _OWN))
register_tower(vit.ViTForImageClassification, HfViT("vit", _AROUND))
register_tower(deit.DeiTModel, HfDeiT("", _OWN))
register_tower(deit.DeiTForImageClassification, HfDeiT("deit", _AROUND))
register_tower(deit.DeiTForImageClassificationWithTeacher, HfTaught("deit", _AROUND[1:]))
register_tower(ijepa.IJepaModel, HfIJepa("", _OWN))
register_tower(ijepa.IJepaForImageClassification, HfIJepa("ijepa", _AROUND[:2]))
register_tower(mae.ViTMAEModel, HfMae("", ("noise", "interpolate_pos_encoding", "attention_mask")))
