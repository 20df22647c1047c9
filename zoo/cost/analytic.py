"""Honest cost accounting.

One convention everywhere: GMACs are 1e9 multiply-accumulates of convolutions, linear layers, the
two attention products and the reducer's own products, for one image, patch embedding and head
included; norms, softmax and elementwise work are not counted. The analytic count needs no data and
no forward pass. Two independent counters check it: fvcore and torch's, both of which drop fused
attention on a CPU unless told otherwise, which `fvcore_gmacs` and `torch_gmacs` do.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from reduction.counts import BlockCost, Dims
from reduction.mixins.attention import OwnAttention
from reduction.schedules.base import Schedule
from zoo.adapters.attention import attention_weights, linear_weights, parts_of, splits_queries
from zoo.adapters.blocks import block_adapter
from zoo.adapters.split_qkv import part_weights
from zoo.adapters.standalone import Standalone
from zoo.adapters.tower import tower_of
from zoo.cost.types import Gmacs, Profile
from zoo.model.anatomy import Anatomy
from zoo.model.plan import Plan, dense_plan, make_plan


def patch_embed_macs(backbone: Any, grid: tuple[int, int]) -> int:
    """Multiply-accumulates of the embedding for a grid `(rows, columns)` of patches."""
    tower = tower_of(backbone)
    embed = tower.stem(backbone)
    rows, columns = grid
    positions = tower.position_macs(backbone)
    if tower.stem_of_layers(backbone):
        return _stem_macs(backbone, grid) + positions
    convs = [m for m in embed.modules() if isinstance(m, nn.Conv2d)]
    weights = sum(c.weight.numel() for c in convs) + linear_weights(embed)
    return weights * rows * columns + positions


def _stem_macs(backbone: Any, grid: tuple[int, int]) -> int:
    """Of a convolutional stem, whose layers have maps of different sizes.

    The sizes come from a copy without data; what a layer costs follows from its weights.
    """
    tower = tower_of(backbone)
    stem = copy.deepcopy(tower.stem(backbone)).to("meta").eval()
    macs = []

    def note(layer: Any, _: Any, out: Tensor) -> None:
        macs.append(out.numel() * layer.weight[0].numel())

    for module in stem.modules():
        module._forward_hooks.clear()  # nobody shall see the copy
        module._forward_pre_hooks.clear()
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(note)
    size = [n * p for n, p in zip(grid, tower.patch_size(backbone), strict=True)]
    with torch.no_grad():
        stem(torch.empty(1, tower.input_size(backbone)[0], *size, device="meta"))
    return sum(macs)


def head_macs(backbone: Any, tokens: int) -> tuple[int, int]:
    """Linear and attention multiply-accumulates of pooling and classifier; see `Tower`."""
    return tower_of(backbone).head_macs(backbone, tokens)


def _attn_linear(attn: Any, tokens: int, rows: int, rereads: str = "no") -> int:
    """Linear layers of an attention that takes in `tokens` and puts out `rows`."""
    out, inside = attention_weights(attn)
    if rereads == "no":
        return inside * tokens + out * rows
    before, value = part_weights(attn)
    after = value if rereads == "values" else inside
    return before * tokens + (after + out) * rows


def _mlp_macs(block: nn.Module, tokens: int, prefix: int) -> int:
    adapter = block_adapter(block)
    if adapter.linear_macs is not None:
        return adapter.linear_macs(block, tokens, prefix)
    return linear_weights(adapter.mlp(block)) * tokens


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


def block_cost(anatomy: Anatomy, i: int, p: Plan) -> BlockCost:
    """Cost of block i with the counts of a plan."""
    block, attn = anatomy.tower.blocks(anatomy.backbone)[i], anatomy.attention(i)
    dims = anatomy.dims(i)
    parts = parts_of(attn)
    # Half of what both products take for a pair of tokens.
    width = dims.heads * (dims.head_dim + (parts.value_dim or dims.head_dim)) // 2
    own = _signal_macs(p.need, p.attention, dims)
    rows, rereads = p.attention, "no"
    products = 2 * p.attention * p.attention * width
    spared = 0
    if p.rows is not None:
        rows, products = p.rows, 2 * p.rows * p.attention * width
        if splits_queries(attn):
            spared = (p.attention - p.rows) * attn.qkv.weight.numel() // 3
    if p.step is not None and anatomy.reducer is not None:
        site = anatomy.reducer.site
        if site == "attn":
            rows = p.mlp
            products = 2 * p.attention * rows * width
            if isinstance(anatomy.reducer, OwnAttention):
                rereads = anatomy.reducer.rereads
                products = anatomy.reducer.attention_macs(p.attention, rows, width)
        before = {"pre": p.entering, "attn": p.attention, "mid": p.attention, "post": p.mlp}[site]
        n = before - anatomy.prefix - p.spared
        own += anatomy.reducer.macs(n, anatomy.prefix, p.step, dims)
        own += anatomy.reducer.settle_macs(n, anatomy.reducer.count(n, p.step), dims)
    return BlockCost(
        p.entering,
        p.mlp,
        p.leaving,
        _attn_linear(attn, p.attention, rows, rereads) - spared,
        products,
        _mlp_macs(block, p.mlp, anatomy.prefix),
        own,
    )


def patch_and_head_gmacs(backbone: Any) -> tuple[int, int]:
    """Patches of the backbone's own grid and the cost of embedding them, reduction apart."""
    rows, columns = tower_of(backbone).grid(backbone)
    return rows * columns, patch_embed_macs(backbone, (rows, columns))


def count(
    anatomy: Anatomy,
    plans: list[Plan],
    patches: int,
    embedding: int,
    with_plugins: bool = True,
    schedule: Schedule | None = None,
) -> tuple[int, int, int, list[BlockCost]]:
    """Multiply-accumulates of a plan: linear, attention, the reducer's own, and of every block.

    Args:
        anatomy: The parts of the model.
        plans: One per block.
        patches: Patches of an image.
        embedding: Cost of the patch embedding.
        with_plugins: Whether plugins take part.
        schedule: Of the model, for plugins.
    """
    blocks = [block_cost(anatomy, i, p) for i, p in enumerate(plans)]
    plugins = list(anatomy.plugins) if with_plugins else []
    linear = attention = 0
    if not any(p.replaces_head for p in plugins):
        linear, attention = head_macs(anatomy.backbone, plans[-1].leaving)
    linear += embedding + sum(b.linear + b.mlp for b in blocks)
    attention += sum(b.attention for b in blocks)
    own = sum(b.reducer for b in blocks) + sum(p.macs(anatomy.backbone) for p in plugins)
    if (entry := plans[0].entry) is not None and anatomy.reducer is not None:
        own += anatomy.reducer.macs(patches, anatomy.prefix, entry, anatomy.dims(0))
    for i, plan in enumerate(plans):
        own += sum(p.block_macs(i, plan.attention, schedule) for p in plugins)
    return linear, attention, own, blocks


def count_alone(
    backbone: Standalone, grid: tuple[int, int]
) -> tuple[int, int, int, list[BlockCost]]:
    """`count` for a backbone that runs itself and says what it costs."""
    fixed, blocks = backbone.macs(grid)
    linear = fixed + sum(b.linear + b.mlp for b in blocks)
    return linear, sum(b.attention for b in blocks), sum(b.reducer for b in blocks), list(blocks)


def counted(
    anatomy: Anatomy,
    schedule: Schedule | None,
    grid: tuple[int, int] | None = None,
    convention: str = "zoo",
    last_block: str = "full",
    params: int = 0,
) -> Profile:
    """Everything that is known about the cost of a model without data.

    Args:
        anatomy: The parts of the model.
        schedule: Of its reducer.
        grid: Patch grid; None is the backbone's own.
        convention: See `zoo.cost.profile.profile`.
        last_block: See `zoo.model.runtime.Runtime`.
        params: Number of parameters, for the record.
    """
    grid = grid or anatomy.grid
    patches = grid[0] * grid[1]
    plans = make_plan(anatomy, schedule, grid, last_block=last_block)
    dense: int | None = None
    if anatomy.alone is None:
        embedding = patch_embed_macs(anatomy.backbone, grid)
        linear, attention, own, blocks = count(
            anatomy, plans, patches, embedding, schedule=schedule
        )
        # Run with the same options: they are no merit of the reduction.
        whole = dense_plan(anatomy, grid, last_block)
        dense = sum(count(anatomy, whole, patches, embedding, False)[:2])
    else:
        linear, attention, own, blocks = count_alone(anatomy.alone, grid)
        if anatomy.alone.method == "none":  # compared with as it is
            dense = linear + attention
    if convention == "diffrate":
        extra = patch_embed_macs(anatomy.backbone, grid) * anatomy.prefix // patches
        linear, dense, own = linear + extra, None if dense is None else dense + extra, 0
    total = linear + attention + own
    return Profile(
        gmacs=total / 1e9,
        params=params,
        tokens=[(p.entering, p.leaving) for p in plans],
        linear=linear / 1e9,
        attention=attention / 1e9,
        reducer=own / 1e9,
        dense=None if dense is None else dense / 1e9,
        blocks=blocks,
        convention=convention,
        macs=total,
    )


def gmacs(
    anatomy: Anatomy,
    schedule: Schedule | None,
    fixed: tuple[int, int] | None = None,
    last_block: str = "full",
) -> Gmacs:
    """Analytic cost under a schedule; None is the dense model.

    Args:
        anatomy: The parts of the model.
        schedule: Schedule to count with.
        fixed: Result of `patch_and_head_gmacs`, to save time in a search.
        last_block: See `zoo.model.runtime.Runtime`.
    """
    patches, embedding = fixed or patch_and_head_gmacs(anatomy.backbone)
    plans = _plans(anatomy, schedule, last_block)
    with_plugins = schedule is not None
    linear, attention, own, _ = count(anatomy, plans, patches, embedding, with_plugins, schedule)
    return Gmacs(linear / 1e9, attention / 1e9, own / 1e9)


def block_costs(
    anatomy: Anatomy, schedule: Schedule | None, last_block: str = "full"
) -> list[BlockCost]:
    """Cost of every block under a schedule; None is the dense model."""
    plans = _plans(anatomy, schedule, last_block)
    return [block_cost(anatomy, i, p) for i, p in enumerate(plans)]


def _plans(anatomy: Anatomy, schedule: Schedule | None, last_block: str) -> list[Plan]:
    if schedule is None:
        return dense_plan(anatomy, last_block=last_block)
    return make_plan(anatomy, schedule, last_block=last_block)
