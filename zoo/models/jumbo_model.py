"""Jumbo: a plain ViT whose one global token is J times as wide as its patches.

Inside attention the wide token is J ordinary tokens at the front of the sequence; between two
attentions those are laid end to end into one vector, which has an MLP of its own. Everything else
here sees J prefix tokens, so every reducer works on the patches behind them.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from timm.layers import LayerNorm, Mlp, get_act_layer, get_norm_layer, resample_abs_pos_embed
from timm.layers import trunc_normal_ as trunc_normal
from timm.models import checkpoint_seq
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from reduction.tokens import take_rows
from zoo.adapters.attention import projection
from zoo.adapters.heads import register_pool
from zoo.errors import ZooError
from zoo.models.jumbo_block import JumboBlock, PatchDrop, check_options, check_pool, placed
from zoo.models.jumbo_weights import check_release, checkpoint_filter_fn, infer_args

__all__ = ["DenseFeatures", "Jumbo", "checkpoint_filter_fn"]


class DenseFeatures(NamedTuple):
    """What a dense head or a decoder starts from.

    Attributes:
        map: Patches `(B, C, rows, columns)`.
        jumbo: The wide token `(B, J*C)`.
    """

    map: Tensor
    jumbo: Tensor


class Jumbo(VisionTransformer):
    """A plain ViT with one wide global token, in the final form of the official code.

    State-dict keys are the official ones, the never used `cls_token` included: it is kept, frozen,
    so that files go both ways. All blocks share the MLP of the wide token, which belongs to the
    model; compile, shard or wrap the model as a whole, not that MLP alone.

    Args:
        img_size: Image size in pixels, one number or `(height, width)`.
        patch_size: Patch size in pixels.
        in_chans: Image channels.
        num_classes: Classes; 0 leaves the head away.
        global_pool: "jumbo" gives the wide token and the mean of the patches, `((J+1)*C)`; ""
            gives all tokens and goes with `num_classes=0`.
        embed_dim: Width C of a token.
        depth: Number of blocks.
        num_heads: Attention heads.
        mlp_ratio: Hidden width of the patches' MLP relative to C.
        jumbo_tokens: J. None is 6, or 3 from a width of 768 on, as in the official sizes.
        jumbo_mlp: MLP of the wide token: "shared" by all blocks (the final release), "unshared",
            or "none".
        jumbo_mlp_ratio: Its hidden width relative to J*C.
        jumbo_lora: Rank of what each block adds to the shared MLP; 0 is nothing.
        patch_drop_rate: Share of the patches dropped in training, an own choice for each image.
            `set_patch_drop` changes it later.
        drop_path_rate: Stochastic depth, the same rate in every block and all three branches.
        drop_path_ramp: Let the rate rise linearly from 0 over the blocks instead.
        norm_layer: Layer norm; None is one with the official epsilon of 1e-5.
        act_layer: Activation; None is the exact GELU.
        weight_init: "" initialises as the official code; for the others see timm.
        device: Of the weights.
        dtype: Of the weights.
        **kwargs: More arguments of timm's VisionTransformer.

    Raises:
        ZooError: If an argument is out of range.

    References:
        Fuller et al., "Thicker and Quicker: A Jumbo Token for Fast Plain Vision Transformers",
        ICLR 2026, arXiv 2502.15021; official code github.com/antofuller/jumbo (MIT).
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "jumbo",
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        jumbo_tokens: int | None = None,
        jumbo_mlp: str = "shared",
        jumbo_mlp_ratio: float = 4.0,
        jumbo_lora: int = 0,
        patch_drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        drop_path_ramp: bool = False,
        norm_layer: Any = None,
        act_layer: Any = None,
        weight_init: str = "",
        device: Any = None,
        dtype: Any = None,
        **kwargs: Any,
    ) -> None:
        slots = (3 if embed_dim >= 768 else 6) if jumbo_tokens is None else jumbo_tokens
        check_options(slots, jumbo_mlp, jumbo_lora, global_pool, num_classes)
        dd = placed(device, dtype)
        norm = get_norm_layer(norm_layer) or partial(LayerNorm, eps=1e-5)
        act = get_act_layer(act_layer) or nn.GELU
        wide = slots * embed_dim
        make = partial(Mlp, wide, int(wide * jumbo_mlp_ratio), act_layer=act, **dd)
        shared = make() if jumbo_mlp == "shared" else None
        own = make if jumbo_mlp == "unshared" else None

        def block(drop_path: float, **args: Any) -> JumboBlock:
            rate = drop_path if drop_path_ramp else drop_path_rate
            return JumboBlock(
                jumbo_tokens=slots,
                shared_mlp=shared,
                own_mlp=own,
                lora_rank=jumbo_lora,
                drop_path=rate,
                **args,
            )

        super().__init__(
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            num_classes=0,
            global_pool="",
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            class_token=False,
            reg_tokens=slots,
            no_embed_class=True,
            drop_path_rate=drop_path_rate,
            norm_layer=norm,
            act_layer=act,
            block_fn=cast(Any, block),
            weight_init="skip",
            **dd,
            **kwargs,
        )
        self.jumbo_tokens = slots
        self.jumbo_token, self.reg_token = self.reg_token, None
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim, **dd), requires_grad=False)
        #: Grid of the position table, which keeps its size whatever the images are.
        self.pos_grid = tuple(int(n) for n in self.patch_embed.grid_size)
        self.patch_drop: Any = PatchDrop(0.0, slots)
        self.set_patch_drop(patch_drop_rate)
        self.jumbo_mlp = shared
        self.head_hidden_size = (slots + 1) * embed_dim
        self.global_pool: Any = global_pool
        self.num_classes = num_classes
        self.head: Any = self._new_head(num_classes)
        if weight_init != "skip":
            self.weight_init_mode = cast(Any, weight_init)
            self.init_weights(needs_reset=False)

    @classmethod
    def from_state_dict(
        cls,
        state: Mapping[str, Tensor],
        num_heads: int | None = None,
        img_size: int | tuple[int, int] | None = None,
        **kwargs: Any,
    ) -> Jumbo:
        """Build the model that a state dict is of, and load it strictly.

        Args:
            state: Weights by their official names.
            num_heads: Attention heads, which weights do not show. None: as in the official size of
                that width, else 64 features per head.
            img_size: Needed where the patch grid is no square.
            **kwargs: Arguments that do not change the weights, such as `dynamic_img_size`.

        Returns:
            The model, in training mode.

        Raises:
            BadCheckpoint: First release, or not the weights of a Jumbo.
        """
        model = cls(**infer_args(state, num_heads, img_size), **kwargs)
        model.load_state_dict(dict(state))
        return model

    # ------------------------------------------------------------------ weights

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """Initialise as the official code does: constant logits of `-ln(classes)` at the start.

        Args:
            mode: See timm; "" is the official initialisation.
            needs_reset: Also reset norms and convolutions.
        """
        # timm 1.0.20 takes no word on what else to reset.
        told = "needs_reset" in inspect.signature(super().init_weights).parameters
        super().init_weights(mode, **({"needs_reset": needs_reset} if told else {}))
        trunc_normal(self.jumbo_token, std=0.02)
        trunc_normal(self.cls_token, std=0.02)
        _init_head(self.head)

    def _new_head(self, num_classes: int) -> nn.Module:
        token: Any = self.jumbo_token
        if not num_classes:
            return nn.Identity()
        return _init_head(
            nn.Linear(self.head_hidden_size, num_classes, device=token.device, dtype=token.dtype)
        )

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a fresh one: zero weights, bias `-ln(classes)`.

        Args:
            num_classes: Classes; 0 leaves the head away.
            global_pool: "jumbo" or ""; None keeps the present one.

        Raises:
            ZooError: If the pooling is unknown, or does not go with a head.
        """
        kind = self.global_pool if global_pool is None else global_pool
        check_pool(kind, num_classes)
        self.global_pool, self.num_classes = kind, num_classes
        self.head = self._new_head(num_classes).train(self.training)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        check_release(state_dict, prefix, unshared=self.blocks[0].jumbo_mlp is not None)
        super()._load_from_state_dict(
            state_dict,
            prefix,
            local_metadata,
            strict,
            missing_keys,
            unexpected_keys,
            error_msgs,
        )
        # Nothing reads it, so a file without it is complete.
        if f"{prefix}cls_token" in missing_keys:
            missing_keys.remove(f"{prefix}cls_token")

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that optimisers should not decay."""
        return {"pos_embed", "cls_token", "jumbo_token"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's layer groups; the shared MLP acts in all blocks and counts as the topmost."""
        return {
            "stem": r"^cls_token|^jumbo_token|^pos_embed|^patch_embed|^norm_pre",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm|^jumbo_mlp", (99999,))],
        }

    # ------------------------------------------------------------------ sizes

    @property
    def num_class_tokens(self) -> int:
        """Leading tokens that together are the class token: all J of them."""
        return self.jumbo_tokens

    def set_input_size(
        self,
        img_size: int | tuple[int, int] | None = None,
        patch_size: int | tuple[int, int] | None = None,
    ) -> None:
        """Take images of another size from now on.

        The position table stays as it is and is resampled in every forward pass, so going back
        restores the model exactly and an optimiser keeps its parameter.

        Args:
            img_size: In pixels; None keeps it.
            patch_size: Resamples the patch embedding; None keeps it.
        """
        table, self.pos_embed = self.pos_embed, None  # timm would resample it for good
        try:
            super().set_input_size(cast(Any, img_size), cast(Any, patch_size))
        finally:
            self.pos_embed = table

    def set_patch_drop(self, rate: float) -> None:
        """Change the share of patches that training drops.

        Raises:
            ZooError: If it is not in [0, 1).
        """
        if not 0 <= rate < 1:
            raise ZooError(f"patch_drop_rate must be in [0, 1), got {rate}")
        self.patch_drop.rate = float(rate)

    # ------------------------------------------------------------------ running

    def embed_patches(self, images: Tensor) -> Tensor:
        """Patches with positions, `(B, N, C)`, row-major, before the wide token is added."""
        return self._positions(self.patch_embed(images))

    def _positions(self, x: Tensor) -> Tensor:
        grid = tuple(self.patch_embed.grid_size)
        if self.dynamic_img_size:
            grid, x = tuple(x.shape[1:3]), x.flatten(1, 2)
        if self.pos_embed is None:
            return x
        table = self.pos_embed
        if self.dynamic_img_size or grid != self.pos_grid:
            table = resample_abs_pos_embed(table, list(grid), list(self.pos_grid), 0)
        return x + table

    def _with_jumbo(self, patches: Tensor) -> Tensor:
        token = cast(Tensor, self.jumbo_token).expand(patches.shape[0], -1, -1)
        return torch.cat([token, patches], dim=1)

    def _pos_embed(self, x: Tensor) -> Tensor:
        return self.pos_drop(self._with_jumbo(self._positions(x)))

    def pool(self, x: Tensor, pool_type: str | None = None, weight: Tensor | None = None) -> Tensor:
        """Lay the wide token and the mean of the patches end to end.

        Args:
            x: Tokens after the final norm, `(B, J+N, C)`.
            pool_type: "jumbo" or ""; None is the model's own.
            weight: Share of each patch in the mean, `(B, N)`; None is an equal one.

        Returns:
            `(B, (J+1)*C)`, or `x` for "".
        """
        kind = self.global_pool if pool_type is None else pool_type
        check_pool(kind, 0)
        if not kind:
            return x
        patches = x[:, self.jumbo_tokens :]
        mean = patches.mean(1) if weight is None else (patches * weight.unsqueeze(-1)).sum(1)
        return torch.cat([x[:, : self.jumbo_tokens].flatten(1), mean], dim=1)

    def forward_tokens(self, patches: Tensor, keep: Tensor | None = None) -> Tensor:
        """Run on tokens that are embedded already, by whatever tokenizer.

        Args:
            patches: `(B, N, C)`, positions included.
            keep: Rows of `patches` to see, `(B, M)`, e.g. those that a masked autoencoder shows
                its encoder; None is all.

        Returns:
            Tokens after the final norm, `(B, J+M, C)`, wide slots first.
        """
        patches = patches if keep is None else take_rows(patches, keep)
        x = self.norm_pre(self.patch_drop(self.pos_drop(self._with_jumbo(patches))))
        if self.grad_checkpointing and torch.is_grad_enabled():
            return self.norm(checkpoint_seq(self.blocks, x))
        return self.norm(self.blocks(x))

    def forward_dense(self, images: Tensor) -> DenseFeatures:
        """Map of the patches and the wide token, both after the final norm."""
        grid = self.patch_embed.dynamic_feat_size(tuple(images.shape[-2:]))
        x = self.forward_tokens(self.embed_patches(images))
        slots, patches = x[:, : self.jumbo_tokens], x[:, self.jumbo_tokens :]
        return DenseFeatures(patches.transpose(1, 2).unflatten(2, grid), slots.flatten(1))

    def attention_map(self, images: Tensor) -> Tensor:
        """What the wide token looks at in the last block, mean over heads and slots.

        Args:
            images: `(B, 3, H, W)`.

        Returns:
            `(B, rows, columns)`. It adds up to less than one: the rest goes to the wide token.
        """
        grid = self.patch_embed.dynamic_feat_size(tuple(images.shape[-2:]))
        x = self.norm_pre(self._pos_embed(self.patch_embed(images)))
        for block in self.blocks[:-1]:
            x = block(x)
        last: Any = self.blocks[-1]
        q, k, _ = projection(last.attn)(last.attn, last.norm1(x))
        logits = (q[:, :, : self.jumbo_tokens] * last.attn.scale) @ k.transpose(-2, -1)
        return logits.softmax(-1)[..., self.jumbo_tokens :].mean((1, 2)).unflatten(1, grid)


register_pool(Jumbo, lambda model, x, weight: model.pool(x, weight=weight))


def _init_head(head: nn.Module) -> nn.Module:
    if isinstance(head, nn.Linear):
        nn.init.zeros_(head.weight)
        nn.init.constant_(head.bias, -math.log(head.out_features))
    return head
