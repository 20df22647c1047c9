"""Tiny models of Hugging Face with random weights, and the same weights as models of timm."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
#: Class, changes of its configuration; "Config" behind the stem of a class is its configuration.
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "vit": ("ViTModel", "ViTConfig", {}),
    "vit-head": ("ViTForImageClassification", "ViTConfig", {"num_labels": 7}),
    "deit": ("DeiTModel", "DeiTConfig", {}),
    "deit-head": ("DeiTForImageClassification", "DeiTConfig", {}),
    "deit-teacher": ("DeiTForImageClassificationWithTeacher", "DeiTConfig", {}),
    "ijepa": ("IJepaModel", "IJepaConfig", {}),
    "ijepa-head": ("IJepaForImageClassification", "IJepaConfig", {}),
    "mae": ("ViTMAEModel", "ViTMAEConfig", {"mask_ratio": 0.0}),
    "dinov2": ("Dinov2Model", "Dinov2Config", {}),
    "dinov2-swiglu": ("Dinov2Model", "Dinov2Config", {"use_swiglu_ffn": True}),
    "dinov2-head": ("Dinov2ForImageClassification", "Dinov2Config", {}),
    "registers": ("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", {}),
    "registers-head": (
        "Dinov2WithRegistersForImageClassification",
        "Dinov2WithRegistersConfig",
        {},
    ),
    "dinov3": ("DINOv3ViTModel", "DINOv3ViTConfig", {"num_register_tokens": 2}),
    "clip": ("CLIPVisionModel", "CLIPVisionConfig", {}),
    "clip-embeds": ("CLIPVisionModelWithProjection", "CLIPVisionConfig", {"projection_dim": 16}),
    "clip-head": ("CLIPForImageClassification", "CLIPConfig", {"num_labels": 5}),
    "siglip": ("SiglipVisionModel", "SiglipVisionConfig", {}),
    "siglip-plain": ("SiglipVisionModel", "SiglipVisionConfig", {"vision_use_head": False}),
    "siglip-head": ("SiglipForImageClassification", "SiglipConfig", {"num_labels": 5}),
    "siglip2": ("Siglip2VisionModel", "Siglip2VisionConfig", {"num_patches": 16}),
    "siglip2-head": ("Siglip2ForImageClassification", "Siglip2Config", {"num_labels": 5}),
    "beit": ("BeitModel", "BeitConfig", {"use_relative_position_bias": True}),
    "beit-class": ("BeitModel", "BeitConfig", {"use_mean_pooling": False}),
    "beit-head": (
        "BeitForImageClassification",
        "BeitConfig",
        {"use_shared_relative_position_bias": True, "use_relative_position_bias": True},
    ),
}


def model(name: str, kernel: str = "sdpa", **changes: Any) -> Any:
    """A tiny model in evaluation mode, every parameter drawn at random."""
    import transformers

    cls, kind, own = CASES[name]
    values = {**SIZES, **own, **changes}
    if kind in ("CLIPConfig", "SiglipConfig", "Siglip2Config"):
        labels = values.pop("num_labels")
        vision = {k: v for k, v in values.items() if kind != "Siglip2Config" or k != "image_size"}
        vision |= {"num_patches": 16} if kind == "Siglip2Config" else {}
        values = {"vision_config": vision, "num_labels": labels}
    elif kind == "Siglip2VisionConfig":
        del values["image_size"]
    config = getattr(transformers, kind)(**values)
    torch.manual_seed(0)
    made = getattr(transformers, cls)._from_config(config, attn_implementation=kernel).eval()
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(p + 0.1 * torch.randn_like(p))
    return made


def inputs(name: str, batch: int = 2) -> dict[str, Tensor]:
    """What such a model is called with."""
    x = torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    if name.startswith("siglip2"):
        patches = torch.randn(batch, 24, 192, generator=torch.Generator().manual_seed(1))
        shapes = torch.tensor([[4, 6]]).expand(batch, -1)
        mask = torch.ones(batch, 24, dtype=torch.int64)
        return {"pixel_values": patches, "pixel_attention_mask": mask, "spatial_shapes": shapes}
    return {"pixel_values": x}


def twin(name: str, hf: Any) -> VisionTransformer:
    """timm's VisionTransformer with the weights of a ViT, DINOv2, CLIP or SigLIP."""
    config, scaled = hf.config, name == "dinov2"
    clip, siglip = name == "clip", name == "siglip"
    act: Any = (
        nn.GELU if name in ("vit", "dinov2") else type(hf.encoder.layers[0].mlp.activation_fn)
    )
    timm_model = VisionTransformer(
        img_size=32,
        patch_size=8,
        embed_dim=32,
        depth=4,
        num_heads=4,
        mlp_ratio=4.0 if scaled else 2.0,
        num_classes=0,
        init_values=1e-5 if scaled else None,
        class_token=not siglip,
        global_pool="avg" if siglip else "token",
        fc_norm=False,
        pre_norm=clip,
        act_layer=act,
        norm_layer=partial(nn.LayerNorm, eps=config.layer_norm_eps),
    ).eval()
    timm_model.load_state_dict(dict(_renamed(name, hf.state_dict())))
    return timm_model


def _renamed(name: str, given: dict[str, Tensor]) -> Any:
    fused: dict[str, dict[str, Tensor]] = {}
    for key, value in given.items():
        if ".mask_token" in key or key.startswith(("pooler", "head.")):
            continue
        for old, new in _NAMES:
            key = key.replace(old, new)
        if key in ("cls_token", "pos_embed") and value.dim() < 3:
            value = value.reshape(1, -1, value.shape[-1])
        stem, _, last = key.rpartition(".")
        front, _, part = stem.rpartition(".")
        if part in ("q_proj", "k_proj", "v_proj"):
            fused.setdefault(f"{front}.qkv.{last}", {})[part] = value
            continue
        yield key, value
    for key, parts in fused.items():
        yield key, torch.cat([parts["q_proj"], parts["k_proj"], parts["v_proj"]])


_NAMES = (
    ("encoder.layers.", "blocks."),
    ("encoder.layer.", "blocks."),
    ("embeddings.patch_embeddings.projection", "patch_embed.proj"),
    ("embeddings.patch_embedding", "patch_embed.proj"),
    ("embeddings.position_embeddings", "pos_embed"),
    ("embeddings.position_embedding.weight", "pos_embed"),
    ("embeddings.cls_token", "cls_token"),
    ("embeddings.class_embedding", "cls_token"),
    ("pre_layrnorm", "norm_pre"),
    ("post_layernorm", "norm"),
    ("layernorm_before", "norm1"),
    ("layernorm_after", "norm2"),
    ("layer_norm1", "norm1"),
    ("layer_norm2", "norm2"),
    ("layers.", "blocks."),
    ("self_attn", "attn"),
    ("attention.", "attn."),
    ("o_proj", "proj"),
    ("out_proj", "proj"),
    ("layer_scale1.lambda1", "ls1.gamma"),
    ("layer_scale2.lambda1", "ls2.gamma"),
    ("layernorm.", "norm."),
)
