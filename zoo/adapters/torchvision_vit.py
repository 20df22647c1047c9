"""torchvision's VisionTransformer: `vit_b_16`, `vit_b_32`, `vit_l_16`, `vit_l_32`, `vit_h_14`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.vision_transformer import Encoder, EncoderBlock, VisionTransformer

from reduction.tokens import Tokens
from zoo.adapters.attention import linear_weights, through
from zoo.adapters.blocks import Attend, BlockAdapter, masked, register_block
from zoo.adapters.timm_tower import WHY_STEM, of_projection, of_table
from zoo.adapters.torch_attention import why_not_plain
from zoo.adapters.tower import Embedded, Tower, register_tower
from zoo.errors import UnsupportedModel, ZooError


class TorchvisionViT(Tower):
    """torchvision's `VisionTransformer`."""

    title = "torchvision VisionTransformer"
    library = "torchvision"

    def check(self, m: Any) -> None:
        """See `Tower`, as for all others."""
        if type(m.encoder).forward is not Encoder.forward:
            raise UnsupportedModel(
                f"the encoder of the VisionTransformer is a {type(m.encoder).__name__}, not "
                "torchvision's Encoder, so its forward is not known"
            )
        attentions = (getattr(block, "self_attention", None) for block in m.encoder.layers)
        plain = (a for a in attentions if isinstance(a, nn.MultiheadAttention))
        if reason := next(filter(None, map(why_not_plain, plain)), ""):
            raise UnsupportedModel(f"a VisionTransformer that cannot be run: {reason}")

    def blocks(self, m: Any) -> Sequence[nn.Module]:
        """See `Tower`."""
        return m.encoder.layers  # type: ignore[no-any-return]

    def prefix(self, m: Any) -> int:
        """See `Tower`."""
        return 1

    def class_tokens(self, m: Any) -> int:
        """See `Tower`."""
        return 1

    def width(self, m: Any) -> int:
        """See `Tower`."""
        return int(m.hidden_dim)

    def classes(self, m: Any) -> int:
        """See `Tower`."""
        last = self.classifier(m)
        return int(last.out_features) if isinstance(last, nn.Linear) else 0

    def reads(self, m: Any) -> str:
        """See `Tower`."""
        return "class"

    def why_all_tokens(self, m: Any) -> str:
        """See `Tower`."""
        return ""

    def grid(self, m: Any) -> tuple[int, int]:
        """See `Tower`."""
        side = int(m.image_size) // int(m.patch_size)
        return side, side

    def patch_size(self, m: Any) -> tuple[int, int]:
        """See `Tower`."""
        return int(m.patch_size), int(m.patch_size)

    def grid_of(self, m: Any, images: Tensor) -> tuple[int, int]:
        """See `Tower`."""
        return self.grid(m)

    def input_size(self, m: Any) -> tuple[int, int, int]:
        """See `Tower`."""
        first = next(c for c in m.conv_proj.modules() if isinstance(c, nn.Conv2d))
        return int(first.in_channels), int(m.image_size), int(m.image_size)

    def check_images(self, m: Any, images: Tensor) -> None:
        """See `Tower`."""
        channels, height, width = self.input_size(m)
        if images.dim() != 4 or tuple(images.shape[1:]) != (channels, height, width):
            raise ZooError(
                f"expected images of shape (B, {channels}, {height}, {width}), got "
                f"{tuple(images.shape)}; resize them, or build the model with image_size="
                f"{images.shape[-1]} (torchvision's interpolate_embeddings brings weights along)"
            )

    def embed(self, m: Any, images: Tensor) -> Embedded:
        """See `Tower`."""
        x = m._process_input(images)
        x = torch.cat([m.class_token.expand(x.shape[0], -1, -1), x], dim=1)
        return Embedded(m.encoder.dropout(x + m.encoder.pos_embedding), None, False)

    def why_one_piece(self, m: Any) -> str:
        """See `Tower`."""
        return WHY_STEM if self.stem_of_layers(m) else ""

    def patches(self, m: Any, images: Tensor) -> Tensor:
        """See `Tower`."""
        return of_projection(m.conv_proj, images)

    def positions(self, m: Any, grid: tuple[int, int]) -> Tensor:
        """See `Tower`."""
        return of_table(m.encoder.pos_embedding, self.grid(m), grid)

    def norm(self, m: Any, x: Tensor) -> Tensor:
        """See `Tower`."""
        return m.encoder.ln(x)  # type: ignore[no-any-return]

    def settings(self, m: Any) -> dict[str, Any]:
        """See `Tower`."""
        block = m.encoder.layers[0]
        stem: Any = m.conv_proj if isinstance(m.conv_proj, nn.Sequential) else ()
        convs: list[Any] = [layer[0] for layer in stem if isinstance(layer, nn.Sequential)]
        own = [[c.out_channels, c.kernel_size[0], c.stride[0]] for c in convs]
        return {
            "image_size": int(m.image_size),
            "patch_size": int(m.patch_size),
            "num_layers": len(m.encoder.layers),
            "num_heads": int(block.num_heads),
            "hidden_dim": int(m.hidden_dim),
            "mlp_dim": int(m.mlp_dim),
            "dropout": float(m.dropout),
            "attention_dropout": float(m.attention_dropout),
            "representation_size": m.representation_size,
            **({"conv_stem_configs": own} if own else {}),
        }

    def stem(self, m: Any) -> nn.Module:
        """See `Tower`."""
        return m.conv_proj  # type: ignore[no-any-return]

    def stem_of_layers(self, m: Any) -> bool:
        """See `Tower`."""
        return not isinstance(m.conv_proj, nn.Conv2d)

    def head_macs(self, m: Any, tokens: int) -> tuple[int, int]:
        """See `Tower`."""
        return linear_weights(m.heads), 0

    def classifier(self, m: Any) -> Any:
        """See `Tower`."""
        return m.heads[-1] if isinstance(m.heads, nn.Sequential) and len(m.heads) else m.heads

    def reset_classifier(self, m: Any, classes: int, pool: str | None = None) -> None:
        """See `Tower`."""
        width = self.features(m)
        new = nn.Linear(width, classes) if classes else nn.Identity()
        new = new.to(m.class_token.device, m.class_token.dtype)
        if isinstance(m.heads, nn.Sequential) and len(m.heads):
            m.heads[-1] = new
        else:
            m.heads = new
        m.num_classes = classes

    def features(self, m: Any) -> int:
        """See `Tower`."""
        last = self.classifier(m)
        return int(last.in_features if isinstance(last, nn.Linear) else self._before(m))

    def _before(self, m: Any) -> int:
        inner = [f for f in m.heads.modules() if isinstance(f, nn.Linear)]
        return inner[-1].out_features if inner else self.width(m)

    def groups(self, m: Any, coarse: bool = False) -> dict[str, Any]:
        """See `Tower`."""
        return {
            "stem": r"^class_token|^conv_proj|^encoder\.pos_embedding",
            "blocks": [
                (r"^encoder\.layers\.encoder_layer_(\d+)", None),
                (r"^encoder\.ln", (99999,)),
            ],
        }

    def class_embedding(self, m: Any) -> Tensor | None:
        """See `Tower`."""
        return m.class_token  # type: ignore[no-any-return]

    def places_prefix(self, m: Any) -> bool:
        """See `Tower`."""
        return True

    def after_blocks(self, m: Any) -> tuple[str, ...]:
        """See `Tower`."""
        return ("encoder.ln.", "heads.")

    def undecayed(self, m: Any) -> set[str]:
        """See `Tower`."""
        return {"class_token", "encoder.pos_embedding"}

    def weighs(self, m: Any) -> bool:
        """See `Tower`."""
        return False

    def leave(self, m: Any, t: Tokens, pre_logits: bool = False) -> Tensor:
        """See `Tower`."""
        x = t.x[:, 0]
        if not pre_logits:
            return m.heads(x)  # type: ignore[no-any-return]
        for layer in list(m.heads)[:-1] if isinstance(m.heads, nn.Sequential) else []:
            x = layer(x)
        return x


def _attn(b: Any, x: Tensor, attend: Attend) -> tuple[Tensor, Any]:
    out, signals = attend(b.self_attention, b.ln_1(x))
    return through(b.dropout, out), signals


def _mlp(b: Any, x: Tensor) -> Tensor:
    return x + _branch(b, x)


def _branch(b: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
    return b.mlp(masked(b.ln_2(x), mask))  # type: ignore[no-any-return]


register_tower(VisionTransformer, TorchvisionViT())
register_block(
    EncoderBlock,
    BlockAdapter(
        _attn,
        _mlp,
        rope=False,
        attn_input=lambda block, x: block.ln_1(x),
        mlp_branch=_branch,
        mlp_masked=_branch,
        attn=lambda block: block.self_attention,
        mlp_drop=lambda block: None,
        masks=False,
    ),
)
