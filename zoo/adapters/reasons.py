"""Why vision transformers of timm have no place to reduce: a sentence for each of its files.

Each says what about the architecture needs all tokens in their places. `docs/coverage.md` accounts
for the families named here and for those in `SUPPORTED`.
"""

from __future__ import annotations

#: timm's files of plain vision transformers: one sequence, attended to as a whole.
SUPPORTED = (
    "vision_transformer",
    "vision_transformer_hybrid",
    "vision_transformer_relpos",
    "deit",
    "eva",
    "beit",
    "naflexvit",
    "vitamin",
)

_WINDOWS = "its blocks attend within windows of the raster of patches"
_MERGES = "later stages join neighbours of the raster"

REASONS = {
    "cait": (
        "its attention mixes the maps of all heads by layers before and behind the softmax, and "
        "the class token joins in blocks of their own behind those of the patches"
    ),
    "coat": "convolutions over the raster stand in every attention, and scales run side by side",
    "convit": (
        "its first blocks blend a softmax over positions of the whole raster into that over content"
    ),
    "crossvit": "two sequences of patches of different sizes run side by side and swap tokens",
    "davit": f"{_WINDOWS}, or among channels, between convolutions, and {_MERGES}",
    "deepseek_vit": (
        "it hands its raster on to a language model, joined 2x2 where it has its aligner; it has "
        "no adapter yet"
    ),
    "edgenext": "convolutions over the raster stand between attentions among channels",
    "efficientformer": "all but its last blocks are convolutions over a raster",
    "efficientformer_v2": "its attention has convolutions over the raster inside",
    "efficientvit_mit": "its linear attention gathers scales by convolutions over the raster",
    "efficientvit_msra": "its attention has convolutions over the raster inside, in stages",
    "fastvit": "it is a hybrid of convolutions over a raster, in stages",
    "focalnet": "it modulates a raster by convolutions and has no attention",
    "gcvit": f"{_WINDOWS}, with queries made of the whole raster, and {_MERGES}",
    "gemma4_vit": (
        "it pools 3x3 neighbours of the raster behind its last block, between clipped layers"
    ),
    "hiera": "its blocks attend within units of a raster that queries pool from stage to stage",
    "hieradet_sam2": f"{_WINDOWS}, and queries pool the raster from stage to stage",
    "levit": "its attention bias and its shrinking attentions are tied to the raster of each stage",
    "maxxvit": f"{_WINDOWS} and grids, between convolutions, and {_MERGES}",
    "metaformer": "it mixes tokens by pooling or convolutions over a raster, in stages",
    "mlp_mixer": "a linear layer over a fixed number of tokens stands in place of attention",
    "mobilevit": "its transformer layers stand between convolutions that need the raster",
    "mvitv2": "its attention pools queries, keys and values by convolutions over the raster",
    "nest": "its blocks attend within blocks of the raster, which convolutions join",
    "nextvit": "its attention pools keys from a raster, between convolutions, in stages",
    "pit": "convolutions shrink its raster between the stages",
    "pvt_v2": "keys and values are made by convolutions over the raster, in stages",
    "qwen3_vit": (
        "it hands its raster on to a language model, joined 2x2 where it has its merger; it has no "
        "adapter yet"
    ),
    "repvit": "it is a convolutional network",
    "sequencer": "recurrent layers run along the rows and columns of its raster",
    "swiftformer": "its additive attention stands between convolutions over the raster",
    "swin_transformer": f"{_WINDOWS}, and {_MERGES}",
    "swin_transformer_v2": f"{_WINDOWS}, and {_MERGES}",
    "swin_transformer_v2_cr": f"{_WINDOWS}, and {_MERGES}",
    "tiny_vit": f"{_WINDOWS}, between convolutions, and {_MERGES}",
    "tnt": "every patch is a sequence of pixels of its own, which blocks of their own run over",
    "twins": f"{_WINDOWS}, or to a raster that convolutions have shrunk, and {_MERGES}",
    "visformer": "its blocks are convolutions and attentions over a raster, in stages",
    "vision_transformer_sam": (
        "most of its blocks attend within windows of the raster of patches, and convolutions over "
        "it stand behind them"
    ),
    "volo": (
        "its outlook attention reads neighbours of the raster, and the class token joins in blocks "
        "of their own behind those of the patches"
    ),
    "xcit": "its attention is among channels, and convolutions over the raster are in every block",
}


def why_not(module: str) -> str:
    """The sentence for a module such as `timm.models.cait`."""
    default = "it has no one sequence of tokens, attended to as a whole, that could become shorter"
    return REASONS.get(module.rpartition(".")[2], default)
