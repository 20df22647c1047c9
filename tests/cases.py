"""The test matrix: methods with easy and hard arguments, and tiny backbones of every family.

A new method adds one row to METHODS; every test in `test_methods.py` then runs on it. Nothing in
those tests names a method.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import reduction
import zoo
from reduction.tokens import OF_THE_MLP
from zoo.model.reduced import ReducedViT
from zoo.models.jumbo import Jumbo


@dataclass(frozen=True)
class Row:
    """One method as it is tested.

    Attributes:
        name: Registry name.
        args: Constructor arguments.
        schedule: Mapping for `zoo.wrap`.
        without_class_token: Arguments that make it work on a model without one.
        prunes: Drops tokens besides merging, so that not even duplicates leave without a trace.
        ranked: Merges only what matters less into what matters more, where a duplicate may miss.
        restores: Parked tokens are back behind the last block.
        own_losses: Learned parts get a gradient from the method's own losses alone.
        stir: Learned parts start so that some get no gradient; tests give them random values.
        soft: Spreads tokens over several others by their likeness, so that what a duplicate gives
            to others than its twin leaves a trace.
        own_counts: Leaves what its pattern or its thresholds give and not just any number.
        gates: Switches parts of blocks: all tokens are there behind every one.
        frames: Only grids with so many times as many rows are taken.
        floor: Share of the dense cost below which the method cannot go on these shallow models.
    """

    name: str
    args: tuple[tuple[str, Any], ...] = ()
    schedule: tuple[tuple[str, Any], ...] = (("name", "keep_rate"), ("rate", 0.6))
    without_class_token: tuple[tuple[str, Any], ...] = ()
    prunes: bool = False
    ranked: bool = False
    restores: bool = False
    own_losses: bool = False
    stir: bool = False
    soft: bool = False
    own_counts: bool = False
    gates: bool = False
    frames: int = 1
    floor: float = 0.0

    @property
    def id(self) -> str:
        return "-".join([self.name, *(f"{k}={v}" for k, v in self.args)])

    def reducer(self, class_token: bool = True) -> dict[str, Any]:
        extra = {} if class_token else dict(self.without_class_token)
        return {"name": self.name, **dict(self.args), **extra}


R8 = (("name", "constant_r"), ("r", 8))
COLUMN = (("score_from", "column_mean"),)
GEOMETRIC = (("name", "geometric"), ("rate", 0.7))

METHODS = [
    Row("tome", schedule=R8),
    Row("tome", (("metric", "feature"), ("prop_attn", False)), (*R8, ("inflection", -1.0))),
    Row("pitome", schedule=GEOMETRIC),
    Row("pitome", (("mode", "pitome"), ("prop_attn", True)), R8),
    Row("pitome", (("mode", "pitome_first"), ("energy", "paper"), ("margin", 0.9)), R8),
    Row("tofu", schedule=R8),
    Row("tofu", (("switch", -1), ("mlerp", "port")), R8),
    Row("tofu", (("switch", ("merge", "prune") * 6), ("mlerp", "mean"))),
    Row("dct", schedule=R8),
    Row("topk", without_class_token=COLUMN),
    Row("topk", COLUMN),
    Row("evit", without_class_token=COLUMN),
    Row("evit", (("fuse", False),), without_class_token=COLUMN),
    Row("etps", without_class_token=COLUMN),
    Row("etps", (("temperature", 0.5), *COLUMN)),
    Row("diffrate", schedule=R8, without_class_token=COLUMN),
    Row("diffrate", (("prune_share", 0.5), ("sort_always", True), *COLUMN), R8, prunes=True),
    Row("gtp", schedule=R8),
    Row(
        "gtp",
        (("selection", "cls_attn_mean"), ("graph", "spatial"), ("alpha", 0.4)),
        R8,
        (("selection", "img_attn_mean"),),
    ),
    Row("gtp", (("sparsity", 0.9), ("token_scale", True), ("neighbours", 5)), R8, prunes=True),
    Row("gtp", (("propagation", "mean"), ("selection", "cos_sim_mean")), R8),
    Row("ppt", without_class_token=COLUMN, prunes=True),
    Row("ppt", (("threshold", 1.0),), without_class_token=COLUMN),
    Row(
        "ppt",
        (("threshold", 1.45e-3), ("patches", None), ("prop_attn", False), *COLUMN),
    ),
    Row("ranked", without_class_token=(("score", "column"),)),
    Row(
        "ranked",
        (("score", "random"), ("settle", "fuse"), ("seed", 3)),
    ),
    Row("ranked", (("score", "norm"), ("settle", "squeeze"), ("temperature", 0.5))),
    Row(
        "ranked",
        (("score", "inverse"), ("settle", "nearest"), ("prop_attn", True)),
        without_class_token=(("score", "norm"),),
        ranked=True,
    ),
    Row("evit", (("score", "random"), ("seed", 5))),
    Row("diffrate", (("score", "norm"), ("prune_share", 0.3)), R8, prunes=True),
    Row("random"),
    Row("heuristic", own_counts=True),
    Row("heuristic", (("pattern", "linf"),), own_counts=True),
    Row("patchmerger"),
    Row("sinkhorn"),
    Row("sit"),
    Row("dpcknn"),
    Row("dpcknn", (("equal_weight", True), ("neighbors", 100))),
    Row("dynamicvit"),
    Row("ltmp", schedule=R8),
    Row("ltm", (("variant", "release"),), R8),
    Row("ltp"),
    Row("dtps"),
    Row("dtps", (("token_loss", "mse"), ("temperature", 0.5))),
    Row("ats"),
    Row("avit"),
    # Where the tokens themselves decide; the schedule is only an upper limit.
    Row("avit", (("scale", 2.0), ("center", 1.0))),
    Row("evovit", without_class_token=COLUMN, restores=True, own_losses=True),
    Row("evovit", (("mode", "layer"), ("head_weight", 0.0)), restores=True),
    Row("evovit", (("fast", "park"), ("drop_last", True), *COLUMN)),
    Row("token_pooling", schedule=GEOMETRIC),
    Row(
        "token_pooling",
        (
            ("algorithm", "kmeans"),
            ("centre", "medoid"),
            ("score_from", "class"),
            ("prop_attn", True),
        ),
        without_class_token=(("score_from", "none"),),
    ),
    Row("token_pooling", (("score_from", "key_norm"), ("iterations", 2)), GEOMETRIC),
    Row("kmedoids_haurum"),
    # Two of the four blocks see all tokens when the last one has them back.
    Row("cropr", schedule=R8, restores=True, own_losses=True, floor=0.5),
    Row("cropr", (("llf", False), ("heads", 3), ("pre_norm", True)), R8, own_losses=True),
    Row("tca", without_class_token=COLUMN),
    Row("tca", (("anchors", 3), ("centers", 2))),
    Row("tokenlearner"),
    Row("tokenlearner", (("version", "1.0"), ("pooling", "mean"))),
    Row(
        "tokenlearner",
        (("fuser", True), ("bottleneck", 16), ("fuser_bottleneck", 16)),
        restores=True,
        stir=True,
    ),
    Row("zero_tprune", without_class_token=(("start_from", "uniform"),)),
    Row(
        "importance_then_similarity",
        schedule=R8,
        without_class_token=COLUMN,
        prunes=True,
        ranked=True,
    ),
    Row(
        "importance_then_similarity",
        (("prune_share", 0.0), ("metric", "key"), *COLUMN),
        R8,
        ranked=True,
    ),
    Row("bat_like", without_class_token=COLUMN),
    Row("bat_like", (("attentive_share", 1.0), ("pair_share", 0.5), *COLUMN)),
    Row("zero_tprune", (("start_from", "uniform"), ("similar_share", 0.0), ("iterations", 3))),
    Row("dtem", schedule=R8),
    Row(
        "dtem",
        (("train_split", "eval"), ("feat_dim", 5), ("tau1", 1.0), ("prop_attn", False)),
        (("name", "keep_rate"), ("rate", 0.6), ("blocks", (1,))),
    ),
    Row("atc"),
    Row("atc", (("linkage", "complete"), ("prop_attn", False), ("mean", "plain")), R8),
    Row("mctf", schedule=R8),
    Row("mctf", (("osa", 2), ("pooling", "max"), ("tau_size", 0.0)), R8),
    Row("mctf", (("osa", 0), ("both", False), ("pooling", "size")), floor=0.65),
    Row("cubistmerge", own_counts=True),
    Row(
        "cubistmerge",
        (("similarity", "distance"), ("compat_last_writer", True)),
        R8,
        own_counts=True,
    ),
    Row("cubistmerge", (("rows", 1), ("columns", 1)), own_counts=True),
    Row("vidtldr", schedule=R8, prunes=True),
    Row("vidtldr", (("prop_attn", False),), R8, prunes=True),
    Row("toma"),
    Row("toma", (("metric", "key"), ("scale", 10.0), ("restore", "soft")), soft=True),
    Row("expedit", own_counts=True, floor=0.5),
    Row(
        "expedit",
        (("restore", "copy"), ("window", 3), ("temperature", 0.5)),
        own_counts=True,
        floor=0.5,
    ),
    Row("dtome", schedule=R8),
    Row("dtome", (("max_r_per_instance_ratio", 1.5), ("prop_attn", False)), R8),
    Row("dtome", (("order", "energy"), ("metric", "feature"), ("energy", "paper")), R8),
    # Forms with thresholds, as far as the schedule says while none are calibrated.
    Row("tofu", (("thresholds", "limit"),), R8, prunes=True),
    Row("mctf", (("thresholds", "limit"),), R8),
    # Similarities alone decide: no schedule makes these cheaper.
    Row("algm", (("layers", (1, 3)), ("threshold", 0.0)), R8, own_counts=True, floor=1.0),
    Row(
        "algm",
        (("layers", (2, 4)), ("threshold", 0.1), ("window", (2, 4))),
        R8,
        own_counts=True,
        floor=1.0,
    ),
    Row("g2tm", (("threshold", 0.2),), R8, own_counts=True, floor=1.0),
    Row(
        "g2tm",
        (("layer", 1), ("threshold", 0.1), ("attention", "iprop")),
        R8,
        own_counts=True,
        floor=1.0,
    ),
    Row("pixelprune", (("threshold", 1.7),), R8, own_counts=True, floor=1.0),
    Row(
        "pixelprune",
        (("scan", "serpentine"), ("metric", "mae"), ("threshold", 0.56), ("mean", 0.0)),
        R8,
        own_counts=True,
        floor=1.0,
    ),
    Row("rlt", (("frames", 2), ("threshold", 1.1)), R8, frames=2, own_counts=True, floor=1.0),
    Row("evs", (("frames", 2),), frames=2, floor=0.5),
    Row("apt", (("thresholds", (5.8,)),), R8, stir=True, own_counts=True, floor=1.0),
    Row(
        "apt",
        (("thresholds", (5.85, 6.9)), ("std", (0.3, 0.5, 0.4))),
        R8,
        stir=True,
        own_counts=True,
        floor=1.0,
    ),
    Row("cts", schedule=R8, own_counts=True),
    Row("flowcut", floor=0.5),
    Row("flowcut", (("target", 50),), R8, own_counts=True, floor=1.0),
    Row("ipcv", (("stabilised", 1),), restores=True, floor=0.5),
    Row("ipcv", (("neighbours", 3),), R8, restores=True, floor=0.5),
    Row(
        "adavit",
        (("token_threshold", 0.88),),
        R8,
        stir=True,
        gates=True,
        own_losses=True,
        own_counts=True,
        floor=1.0,
    ),
    Row(
        "adavit",
        (
            ("keep_layers", 0),
            ("token_threshold", 0.87),
            ("head_threshold", 0.88),
            ("layer_threshold", 0.85),
        ),
        R8,
        stir=True,
        gates=True,
        own_losses=True,
        own_counts=True,
        floor=1.0,
    ),
    Row("idlevit", restores=True),
    Row("asvit", (("first", 0), ("tau", 0.1))),
    Row("asvit", (("first", 0), ("accumulate", "sum"), ("tau", 0.1))),
    Row("asvit", (("first", 0), ("accumulate", "ema"), ("beta", 0.5), ("tau", 0.1))),
    # Behind the block, two of the four are whole.
    Row("repshift", floor=0.5),
    Row("repshift", (("op", "attention"), ("distance", "l1"), ("residual", True)), floor=0.5),
    Row("repshift", (("op", "block"), ("distance", "cosine"), ("settle", "nearest")), floor=0.5),
    Row("evit", (("score", "repshift"),), floor=0.5),
    Row("evovit", (("score", "repshift"),), restores=True, own_losses=True),
]

_VIT: dict[str, Any] = dict(
    img_size=32, patch_size=4, embed_dim=48, depth=4, num_heads=3, num_classes=10, mlp_ratio=2
)
_EVA: dict[str, Any] = {**_VIT, "embed_dim": 48, "num_heads": 3}

# The oldest timm that is supported has no such option, and cannot build its post-norm Eva.
OLD = "qk_norm" not in inspect.signature(Eva).parameters
_QK_NORM = {} if OLD else {"qk_norm": True}

# A name says which of timm's families it stands for.
BACKBONES: dict[str, Callable[..., nn.Module]] = {
    "plain": partial(VisionTransformer, **_VIT),
    "distilled": partial(VisionTransformerDistilled, **_VIT),
    "registers": partial(
        VisionTransformer, reg_tokens=4, no_embed_class=True, init_values=1e-1, **_VIT
    ),
    "dinov2": partial(VisionTransformer, init_values=1e-1, **_VIT),
    "gap": partial(VisionTransformer, class_token=False, global_pool="avg", **_VIT),
    "mae": partial(VisionTransformer, global_pool="avg", **_VIT),
    "map": partial(VisionTransformer, class_token=False, global_pool="map", **_VIT),
    "avgmax": partial(VisionTransformer, class_token=False, global_pool="avgmax", **_VIT),
    "qk_norm": partial(VisionTransformer, qk_norm=True, scale_attn_norm=True, **_VIT),
    "clip": partial(VisionTransformer, pre_norm=True, qkv_bias=True, **_VIT),
    "eva02": partial(
        Eva, use_rot_pos_emb=True, swiglu_mlp=True, scale_mlp=True, qkv_fused=False, **_EVA
    ),
    "eva02_fused": partial(Eva, use_rot_pos_emb=True, swiglu_mlp=True, **_EVA),
    "dinov3": partial(
        Eva,
        use_rot_pos_emb=True,
        rope_type="dinov3",
        use_abs_pos_emb=False,
        num_reg_tokens=4,
        init_values=1e-1,
        global_pool="token",
        rope_rotate_half=True,
        **_EVA,
    ),
    "rope_mixed": partial(
        Eva, use_rot_pos_emb=True, rope_type="mixed", attn_type="rope", **_QK_NORM, **_EVA
    ),
    **({} if OLD else {"post_norm": partial(Eva, use_post_norm=True, **_EVA)}),
    "jumbo": partial(Jumbo, jumbo_tokens=3, **_VIT),
}

ALL = list(BACKBONES)
WITHOUT_CLASS_TOKEN = ("gap", "map", "avgmax")
#: Enough to see every adapter: what runs for every method.
CORE = ["plain", "distilled", "registers", "gap", "map", "eva02", "dinov3", "rope_mixed", "jumbo"]


def backbone(name: str, seed: int = 0, **overrides: Any) -> nn.Module:
    """A tiny backbone with weights that are not at their (often nearly dead) initial values."""
    if OLD and name == "post_norm":
        pytest.skip("this timm cannot build it")
    torch.manual_seed(seed)
    model = BACKBONES[name](**overrides)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def images(batch: int = 2, size: int = 32, seed: int = 1) -> torch.Tensor:
    """Random images `(B, 3, size, size)`."""
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


def refused(row: Row, name: str) -> bool:
    """Whether a method says that it needs what this backbone does not have."""
    made = reduction.create(**row.reducer())
    if (made.needs & OF_THE_MLP or row.gates) and name == "jumbo":
        return True
    needs = made.needs_class_token
    return needs and not row.without_class_token and name in WITHOUT_CLASS_TOKEN


def model(row: Row, name: str = "plain", **overrides: Any) -> ReducedViT:
    """A row's method on a tiny backbone, in evaluation mode."""
    m = backbone(name, **overrides)
    reducer = row.reducer(getattr(m, "cls_token", None) is not None)
    made = zoo.wrap(m, reducer, dict(row.schedule)).eval()
    if row.stir:
        with torch.no_grad():
            for parameter in made.reducer.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return made
