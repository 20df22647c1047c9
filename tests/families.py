"""Tiny backbones of timm's further families, with weights that are not at their initial values."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timm.models import vision_transformer as vit
from timm.models.beit import Beit
from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_relpos import ResPostRelPosBlock, VisionTransformerRelPos
from torch import nn

import zoo
from tests.cases import COLUMN, METHODS, Row
from zoo.model.reduced import ReducedViT

TINY: dict[str, Any] = dict(
    img_size=24, patch_size=4, embed_dim=24, depth=3, num_heads=2, num_classes=5, mlp_ratio=2
)


def naflex(**options: Any) -> NaFlexVit:
    """A tiny NaFlexVit for images of 24x24, and of any other size."""
    own = dict(patch_size=4, embed_dim=24, depth=3, num_heads=2, mlp_ratio=2, fix_init=False)
    own |= dict(pos_embed_grid_size=(6, 6))
    return NaFlexVit(NaFlexVitCfg(**{**own, **options}), num_classes=5)


FAMILIES: dict[str, Callable[..., nn.Module]] = {
    "beit": partial(Beit, use_rel_pos_bias=True, use_abs_pos_emb=False, init_values=0.5, **TINY),
    "beit_shared": partial(
        Beit, use_shared_rel_pos_bias=True, global_pool="token", swiglu_mlp=True, **TINY
    ),
    "beit_both": partial(
        Beit, use_shared_rel_pos_bias=True, use_rel_pos_bias=True, qkv_bias=False, **TINY
    ),
    "beit_wide": partial(
        Beit, use_rel_pos_bias=True, scale_mlp=True, **{**TINY, "img_size": (16, 28)}
    ),
    "relpos": partial(VisionTransformerRelPos, init_values=0.5, **TINY),
    "relpos_class": partial(
        VisionTransformerRelPos, class_token=True, global_pool="token", qk_norm=True, **TINY
    ),
    "relpos_shared": partial(VisionTransformerRelPos, shared_rel_pos=True, fc_norm=True, **TINY),
    "relpos_table": partial(
        VisionTransformerRelPos,
        rel_pos_type="bias",
        class_token=True,
        block_fn=ResPostRelPosBlock,
        **TINY,
    ),
    "scaling": partial(
        VisionTransformer, block_fn=vit.ParallelScalingBlock, init_values=0.5, **TINY
    ),
    "scaling_biased": partial(
        VisionTransformer,
        block_fn=vit.ParallelScalingBlock,
        qkv_bias=False,
        qk_norm=True,
        global_pool="avg",
        **TINY,
    ),
    "things": partial(
        VisionTransformer,
        block_fn=vit.ParallelThingsBlock,
        scale_attn_norm=True,
        scale_mlp_norm=True,
        qkv_bias=True,
        init_values=0.5,
        **TINY,
    ),
    "naflex": partial(naflex, class_token=True, reg_tokens=1, global_pool="token"),
    "naflex_map": partial(naflex, global_pool="map"),
    "naflex_gap": partial(
        naflex, reg_tokens=2, global_pool="avg", pos_embed="factorized", init_values=0.5
    ),
    "naflex_rope": partial(
        naflex,
        class_token=True,
        global_pool="avgmax",
        pos_embed="none",
        rope_type="axial",
        qk_norm=True,
        swiglu_mlp=True,
    ),
    "naflex_mixed": partial(naflex, global_pool="max", rope_type="mixed", pre_norm=True),
    "relpos_swin": partial(VisionTransformerRelPos, rel_pos_type="mlp-swin", **TINY),
}
if hasattr(vit, "DiffParallelScalingBlock"):  # not in timm 1.0.20
    FAMILIES |= {
        "scaling_fused": partial(
            VisionTransformer,
            block_fn=partial(vit.ParallelScalingBlock, fuse_out_proj=True),
            **TINY,
        ),
        "diff": partial(VisionTransformer, attn_layer="diff", qk_norm=True, **TINY),
        "diff_post": partial(
            VisionTransformer, block_fn=vit.ResPostBlock, attn_layer="diff", **TINY
        ),
        "diff_things": partial(
            VisionTransformer, block_fn=vit.ParallelThingsBlock, attn_layer="diff", **TINY
        ),
        "diff_scaling": partial(
            VisionTransformer, block_fn=vit.DiffParallelScalingBlock, qkv_bias=False, **TINY
        ),
        "diff_dual": partial(
            VisionTransformer,
            block_fn=partial(vit.DiffParallelScalingBlock, dual_lambda=True),
            reg_tokens=2,
            global_pool="map",
            class_token=False,
            **TINY,
        ),
    }


def family(name: str, seed: int = 0, fused: bool = True, **overrides: Any) -> Any:
    """One of them, in evaluation mode."""
    torch.manual_seed(seed)
    model: Any = FAMILIES[name](**overrides)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    for module in model.modules():
        if not fused and hasattr(module, "fused_attn"):
            module.fused_attn = False
    return model.eval()


def pictures(model: Any, batch: int = 2, seed: int = 1) -> torch.Tensor:
    """Random images of a model's own size."""
    size = zoo.wrap(model, None).tower.input_size(model)
    return torch.randn(batch, *size, generator=torch.Generator().manual_seed(seed))


def reduced(row: Row, model: Any) -> ReducedViT:
    """A row's method on a backbone, in evaluation mode."""
    tower = zoo.wrap(model, None).tower
    made = zoo.wrap(model, row.reducer(tower.class_tokens(model) > 0), dict(row.schedule)).eval()
    if row.stir:
        with torch.no_grad():
            for parameter in made.reducer.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return made


def first_rows() -> list[Row]:
    """Every method once, with its first arguments."""
    rows: dict[str, Row] = {}
    for row in METHODS:
        rows.setdefault(row.name, row)
    return list(rows.values())


def kind_of(name: str) -> str:
    """The family that one of `FAMILIES` is a variant of."""
    return name.split("_")[0]


__all__ = ["COLUMN", "FAMILIES", "TINY", "family", "first_rows", "kind_of", "pictures", "reduced"]
