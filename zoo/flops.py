"""Honest cost accounting.

One convention everywhere: GMACs are 1e9 multiply-accumulates of convolutions, linear layers, the
two attention products and the reducer's own products, for one image, patch embedding and head
included; norms, softmax and elementwise work are not counted. The analytic count needs no data and
no forward pass. Two independent counters check it: fvcore and torch's, both of which drop fused
attention on a CPU unless told otherwise, which `fvcore_gmacs` and `torch_gmacs` do.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from reduction.base import Dims
from reduction.schedule import Schedule
from zoo.adapters.attention import splits_queries
from zoo.adapters.backbones import class_tokens
from zoo.adapters.blocks import block_adapter
from zoo.adapters.parts import part_weights
from zoo.adapters.standalone import Standalone, as_standalone
from zoo.cost import BlockCost, Gmacs, Profile
from zoo.errors import ZooError
from zoo.plan import Plan
from zoo.reduced import ReducedViT
from zoo.sampling import is_adaptive, measure

CONVENTIONS = ("zoo", "diffrate")


# ---------------------------------------------------------------------------- analytic count


def _weights(module: nn.Module) -> int:
    """Multiply-accumulates of a module's linear layers for one token."""
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))


def patch_embed_macs(backbone: nn.Module, patches: int) -> int:
    """Multiply-accumulates of the patch embedding for so many patches."""
    convs = [m for m in backbone.patch_embed.modules() if isinstance(m, nn.Conv2d)]
    return sum(c.weight.numel() for c in convs) * patches + _weights(backbone.patch_embed) * patches


def head_macs(backbone: nn.Module, tokens: int) -> tuple[int, int]:
    """Linear and attention multiply-accumulates of pooling and classifier."""
    linear = sum(
        _weights(getattr(backbone, name)) for name in ("head", "head_dist") if _has(backbone, name)
    )
    pool = getattr(backbone, "attn_pool", None)
    if pool is None:
        return linear, 0
    if not hasattr(pool, "kv"):
        width = int(backbone.embed_dim)
        return linear, 2 * tokens * tokens * width
    rows = pool.latent_len
    keys = tokens if getattr(backbone, "pool_include_prefix", False) else None
    keys = keys if keys is not None else tokens - int(backbone.num_prefix_tokens)
    linear += pool.kv.weight.numel() * keys
    for part in ("q", "proj", "mlp"):
        if isinstance(getattr(pool, part), nn.Module):
            linear += _weights(getattr(pool, part)) * rows
    width = pool.num_heads * pool.head_dim
    return linear, 2 * rows * keys * width


def _has(module: nn.Module, name: str) -> bool:
    return isinstance(getattr(module, name, None), nn.Module)


def _dims(block: nn.Module, class_rows: int) -> Dims:
    attn = block.attn
    return Dims(attn.proj.out_features, attn.num_heads, attn.head_dim, class_rows)


def _attn_linear(attn: nn.Module, tokens: int, rows: int, rereads: str = "no") -> int:
    """Linear layers of an attention that takes in `tokens` and puts out `rows`."""
    out = _weights(attn.proj)
    if rereads == "no":
        return (_weights(attn) - out) * tokens + out * rows
    before, value = part_weights(attn)
    after = value if rereads == "values" else _weights(attn) - out
    return before * tokens + (after + out) * rows


def _mlp_macs(block: nn.Module, tokens: int, prefix: int) -> int:
    own = block_adapter(block).linear_macs
    return _weights(block.mlp) * tokens if own is None else own(block, tokens, prefix)


def _signal_macs(need: frozenset[str], tokens: int, dims: Dims) -> int:
    """Products spent on signals. The whole map comes with attention itself and costs nothing."""
    width = dims.heads * dims.head_dim
    cost = 0
    if "attn" not in need:
        if "cls_row" in need:
            cost += dims.class_tokens * tokens * width
        if "column" in need:
            cost += tokens * tokens * width
    return cost


def block_cost(model: ReducedViT, i: int, p: Plan) -> BlockCost:
    """Cost of block i with the counts of a plan."""
    block = model.backbone.blocks[i]
    dims = _dims(block, max(1, class_tokens(model.backbone)))
    width = dims.heads * dims.head_dim
    own = _signal_macs(p.need, p.attention, dims)
    rows, rereads = p.attention, "no"
    products = 2 * p.attention * p.attention * width
    spared = 0
    if p.rows is not None:
        rows, products = p.rows, 2 * p.rows * p.attention * width
        if splits_queries(block.attn):
            spared = (p.attention - p.rows) * block.attn.qkv.weight.numel() // 3
    if p.step is not None and model.reducer is not None:
        site = model.reducer.site
        if site == "attn":
            rows, rereads = p.mlp, model.reducer.rereads
            products = model.reducer.attention_macs(p.attention, rows, width)
        before = {"pre": p.entering, "attn": p.attention, "mid": p.attention, "post": p.mlp}[site]
        own += model.reducer.macs(before - model.prefix - p.spared, model.prefix, p.step, dims)
    return BlockCost(
        p.entering,
        p.mlp,
        p.leaving,
        _attn_linear(block.attn, p.attention, rows, rereads) - spared,
        products,
        _mlp_macs(block, p.mlp, model.prefix),
        own,
    )


def patch_and_head_gmacs(backbone: nn.Module) -> tuple[int, int]:
    """Patches of the backbone's own grid and the cost of embedding them, reduction apart."""
    rows, columns = backbone.patch_embed.grid_size
    return int(rows * columns), patch_embed_macs(backbone, int(rows * columns))


def _count(
    model: ReducedViT,
    plans: list[Plan],
    patches: int,
    embedding: int | None = None,
    with_plugins: bool = True,
    schedule: Schedule | None = None,
) -> tuple[int, int, int, list[BlockCost]]:
    blocks = [block_cost(model, i, p) for i, p in enumerate(plans)]
    plugins = list(model.plugins) if with_plugins else []
    linear = attention = 0
    if not any(p.replaces_head for p in plugins):
        linear, attention = head_macs(model.backbone, plans[-1].leaving)
    linear += patch_embed_macs(model.backbone, patches) if embedding is None else embedding
    linear += sum(b.linear + b.mlp for b in blocks)
    attention += sum(b.attention for b in blocks)
    own = sum(b.reducer for b in blocks) + sum(p.macs(model.backbone) for p in plugins)
    for i, plan in enumerate(plans):
        own += sum(p.block_macs(i, plan.attention, schedule) for p in plugins)
    return linear, attention, own, blocks


def _count_alone(
    backbone: Standalone, grid: tuple[int, int]
) -> tuple[int, int, int, list[BlockCost]]:
    fixed, blocks = backbone.macs(grid)
    linear = fixed + sum(b.linear + b.mlp for b in blocks)
    return linear, sum(b.attention for b in blocks), sum(b.reducer for b in blocks), list(blocks)


def gmacs(
    model: ReducedViT, schedule: Schedule | None, fixed: tuple[int, int] | None = None
) -> Gmacs:
    """Analytic cost under a schedule; None is the dense model.

    Args:
        model: The wrapped model.
        schedule: Schedule to count with.
        fixed: Result of `patch_and_head_gmacs`, to save time in a search.
    """
    patches, embedding = fixed or patch_and_head_gmacs(model.backbone)
    plans = model.plan(schedule=schedule) if schedule is not None else _dense_plan(model)
    with_plugins = schedule is not None
    linear, attention, own, _ = _count(model, plans, patches, embedding, with_plugins, schedule)
    return Gmacs(linear / 1e9, attention / 1e9, own / 1e9)


def block_costs(model: ReducedViT, schedule: Schedule | None) -> list[BlockCost]:
    """Cost of every block under a schedule; None is the dense model."""
    plans = model.plan(schedule=schedule) if schedule is not None else _dense_plan(model)
    return [block_cost(model, i, p) for i, p in enumerate(plans)]


def _dense_plan(model: ReducedViT, grid: tuple[int, int] | None = None) -> list[Plan]:
    rows, columns = grid or model.grid
    n = rows * columns + model.prefix
    return [Plan(n, n, n, n, None, frozenset()) for _ in range(model.depth)]


def profile(
    model: nn.Module,
    img_size: int | tuple[int, int] | None = None,
    convention: str = "zoo",
    images: Tensor | Iterable[Tensor] | None = None,
) -> Profile:
    """Count parameters, multiply-accumulates and tokens, as a rule without running the model.

    Args:
        model: A `ReducedViT` or a supported timm model.
        img_size: Image size in pixels; None is the model's own.
        convention: "zoo" (see the module docstring) or "diffrate": that paper's formula, which
            counts the patch embedding once for every prefix token too and leaves matching out.
        images: `(N, 3, H, W)`, or batches of them. A method that keeps a different number of tokens
            in every image is run on them, and the counts are means over them; without images they
            are upper limits. Costs of other methods do not depend on images.

    Raises:
        ZooError: If the convention is unknown or the image size does not fit.
    """
    if convention not in CONVENTIONS:
        raise ZooError(f"convention must be one of {CONVENTIONS}, got {convention!r}")
    if images is not None and is_adaptive(model):
        if convention != "zoo" or img_size is not None:
            raise ZooError(
                "a cost measured on images has their size and the convention 'zoo'; leave img_size "
                "and convention away"
            )
        return measure(model, images)  # type: ignore[arg-type]
    wrapped = model if isinstance(model, ReducedViT) else ReducedViT(model)
    grid = wrapped.grid if img_size is None else _grid(wrapped.backbone, img_size)
    patches = grid[0] * grid[1]
    plans = wrapped.plan(grid)
    alone = as_standalone(wrapped.backbone)
    if alone is None:
        given = wrapped.schedule
        linear, attention, own, blocks = _count(wrapped, plans, patches, schedule=given)
        dense: int | None = sum(
            _count(wrapped, _dense_plan(wrapped, grid), patches, None, False)[:2]
        )
    else:
        linear, attention, own, blocks = _count_alone(alone, grid)
        dense = None
    if convention == "diffrate":
        extra = patch_embed_macs(wrapped.backbone, wrapped.prefix)
        linear, dense, own = linear + extra, None if dense is None else dense + extra, 0
    total = linear + attention + own
    return Profile(
        gmacs=total / 1e9,
        params=sum(p.numel() for p in model.parameters()),
        tokens=[(p.entering, p.leaving) for p in plans],
        linear=linear / 1e9,
        attention=attention / 1e9,
        reducer=own / 1e9,
        dense=None if dense is None else dense / 1e9,
        blocks=blocks,
        convention=convention,
        macs=total,
    )


def _grid(backbone: nn.Module, img_size: int | tuple[int, int]) -> tuple[int, int]:
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    patch = backbone.patch_embed.patch_size
    if height % patch[0] or width % patch[1]:
        raise ZooError(
            f"image size {height}x{width} is not divisible by the patch size {patch[0]}x{patch[1]}"
        )
    return height // patch[0], width // patch[1]


# ---------------------------------------------------------------------------- counters


def _sdpa_macs(inputs: list[Any], outputs: list[Any]) -> int:
    """fvcore handler: both products of scaled dot-product attention."""
    q, k, v = (_shape(x) for x in inputs[:3])
    return prod(q[:-1]) * k[-2] * (q[-1] + v[-1])


def _cdist_macs(inputs: list[Any], outputs: list[Any]) -> int:
    a, b = (_shape(x) for x in inputs[:2])
    return prod(a[:-1]) * b[-2] * a[-1]


def _baddbmm_macs(inputs: list[Any], outputs: list[Any]) -> int:
    a, b = _shape(inputs[1]), _shape(inputs[2])
    return prod(a) * b[-1]


def _shape(value: Any) -> list[int]:
    return value.type().sizes()


def _nothing(inputs: list[Any], outputs: list[Any]) -> int:
    return 0


FVCORE_HANDLERS: dict[str, Callable[[list[Any], list[Any]], int]] = {
    "aten::scaled_dot_product_attention": _sdpa_macs,
    "aten::cdist": _cdist_macs,
    "aten::_cdist": _cdist_macs,
    "aten::_euclidean_dist": _cdist_macs,
    "aten::baddbmm": _baddbmm_macs,
    # fvcore counts norms (0.0095 G on DeiT-S); the convention here does not.
    "aten::layer_norm": _nothing,
    "aten::batch_norm": _nothing,
}


def fvcore_gmacs(model: nn.Module, images: Tensor) -> float:
    """Count one image with fvcore and handlers for what it leaves out.

    Args:
        model: Any model; it is traced in evaluation mode.
        images: `(B, 3, H, W)`; the count is per image.
    """
    from fvcore.nn import FlopCountAnalysis

    was = model.training
    model.eval()
    try:
        count = FlopCountAnalysis(model, images).set_op_handle(**FVCORE_HANDLERS)
        count.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        count.tracer_warnings("none")
        return count.total() / images.shape[0] / 1e9
    finally:
        model.train(was)


def torch_gmacs(model: nn.Module, images: Tensor) -> float:
    """Count one image with torch's FlopCounterMode on the meta device, where it sees attention.

    Args:
        model: Any model; a copy of it runs in evaluation mode, without data.
        images: `(B, 3, H, W)`; the count is per image.
    """
    from torch.utils.flop_counter import FlopCounterMode

    # Without frozen parameters the counter hooks views of them and fails.
    ghost = copy.deepcopy(model).to("meta").eval().requires_grad_(False)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        ghost(images.to("meta"))
    # The counter counts a multiply-accumulate as two operations.
    return counter.get_total_flops() / 2 / images.shape[0] / 1e9
