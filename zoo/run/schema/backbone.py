"""Arguments of backbones whose values are known: those of timm's vision transformers."""

from __future__ import annotations

from zoo.run.schema.kinds import either, flag, list_of, maybe, real, whole

SIDE = whole(1, 8192)
SIZE = either(SIDE, list_of(SIDE, "[height, width]", 2, 2))
#: Arguments of timm's models that have a range; the others are left to timm.
BACKBONE_ARGS = {
    "img_size": SIZE,
    "patch_size": SIZE,
    "num_classes": whole(0),
    "in_chans": whole(1, 4096),
    "depth": whole(1, 1000),
    "embed_dim": whole(1, 2**16),
    "num_heads": whole(1, 2**16),
    "mlp_ratio": real(above=0),
    "drop_rate": real(0, below=1),
    "pos_drop_rate": real(0, below=1),
    "patch_drop_rate": real(0, below=1),
    "proj_drop_rate": real(0, below=1),
    "attn_drop_rate": real(0, below=1),
    "drop_path_rate": real(0, below=1),
    "qkv_bias": flag(),
    "qk_norm": flag(),
    "dynamic_img_size": flag(),
    "dynamic_img_pad": flag(),
    "class_token": flag(),
    "compressed_grid": maybe(SIZE),
}
