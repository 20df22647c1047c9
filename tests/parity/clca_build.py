"""From a variant of a CLCA fixture to a model with its weights."""

from __future__ import annotations

import importlib
import math
import re
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import reduction
import zoo
from reduction.counts import Step
from reduction.mixins.attention import AttentionInput, AttentionOutput
from reduction.tokens import Tokens
from tests.parity.fixture import Fixture, Unsupported
from zoo.adapters.attention import run_attention
from zoo.model.reduced import ReducedViT
from zoo.plugins.base import Plugin, create_plugins
from zoo.plugins.cla import LayerMixHead
from zoo.plugins.clc import CLC
from zoo.plugins.clca import CLCA

#: Class of the official code: our method, and the prefix of its learned parts in a fixture.
REDUCERS: dict[str, tuple[str | None, str]] = {
    "ViT": (None, ""),
    "EViT": ("evit", ""),
    "TopK": ("topk", ""),
    "ToMeViT": ("tome", ""),
    "PatchMergerViT": ("patchmerger", "patchmerger"),
    "SiT": ("sit", "sit"),
    "DyViT": ("dynamicvit", "dyvit"),
    "DPCKNNViT": ("dpcknn", "dpcknn"),
    "ATSViT": ("ats", ""),
}


def official_counts(
    method: str,
    rates: list[float],
    blocks: list[int],
    patches: int,
    plugins: list[Plugin],
    depth: int,
) -> list[int | None]:
    """Tokens that each stage keeps by the official rules, for the schedule `per_block`.

    Some rules count what CLCA adds and some do not. Never below one, where the official code may
    ask for none.

    Args:
        method: Name of ours.
        rates: One keep rate per stage, or one for all.
        blocks: The stages.
        patches: Tokens at the start, CLR not counted.
        plugins: Already set up for `blocks`.
        depth: Number of blocks.
    """
    added = [sum(p.added(b, depth) for p in plugins) for b in range(-1, depth)]
    keep: list[int | None] = [None] * depth
    n, clr, shares = patches + added[0], added[0], [patches]
    for block in range(depth):
        if block in blocks:
            stage = blocks.index(block)
            rate = rates[stage] if len(rates) > 1 else rates[0]
            shares.append(int(patches * rate ** (stage + 1)))
            count = shares[-1]
            if method in ("evit", "topk"):
                count = math.ceil(rate * n)
            elif method == "tome":
                count = n - min(shares[-2] - shares[-1], n // 2)
            elif method == "dynamicvit" and sum(added) > clr:
                count = int((n - 1) * rate)
            elif method == "dynamicvit":
                count = int((patches + clr) * rate ** (stage + 1))
            elif method == "dpcknn" and block != blocks[-1]:
                count = max(count, 5)
            spared = sum(added[: block + 1]) if method == "dpcknn" else 0
            if count < n - spared:
                keep[block] = max(1, count)
                n = max(1, count) + spared + (method == "evit")
        n += added[block + 1]
    return keep


def plugin_specs(variant: dict[str, Any], blocks: list[int]) -> list[dict[str, Any]]:
    """The plugins of a variant; flags that are absent have the official code's fallbacks."""
    args = variant["official_args"]
    head = {"multiplier": int(args.get("ifa_dws_conv_groups", 2)), "blocks": blocks}
    cache = {
        "gap": bool(args.get("clc_include_gap", False)),
        "num_clr": int(args.get("num_clr", variant["num_clr"])),
        "recover_at_last": bool(args.get("clc_recover_at_last", False)),
        "pool_cls": bool(args.get("clc_pool_cls", False)),
        "pool_clr": bool(args.get("clc_pool_clr", False)),
        "blocks": blocks,
    }
    with_head = bool(args.get("ifa_head", variant["cla"]))
    if args.get("clc", variant["clc"]):
        return [{"name": "clca", **cache, **head} if with_head else {"name": "clc", **cache}]
    found: list[dict[str, Any]] = []
    if cache["num_clr"]:  # registers without a cache
        found.append({"name": "clc", **cache, "cache": False})
    return [*found, {"name": "cla", **head}] if with_head else found


def build(fx: Fixture, variant: dict[str, Any]) -> ReducedViT:
    """The variant's model with its weights, through the public API.

    Raises:
        Unsupported: If its reducer is not there, or something it asks for has no counterpart.
    """
    args = variant["official_args"]
    if variant["official_class"] not in REDUCERS:
        raise Unsupported(f"unknown official class {variant['official_class']!r}")
    method, learned = REDUCERS[variant["official_class"]]
    if method is not None and method not in reduction.list_methods():
        raise Unsupported(f"needs reducer {method!r} (official {variant['official_class']})")
    blocks = [int(b) for b in args.get("reduction_loc", [3, 6, 9])]
    rates = [float(r) for r in args.get("keep_rate", [1.0])]
    if method in ("evit", "topk", "tome") and all(r == 1 for r in rates):
        method = None  # nothing is reduced
    weights = fx.group("model.")
    backbone = _backbone(fx, weights)
    plugins = create_plugins(plugin_specs(variant, blocks))
    reducer: Any = None
    schedule = None
    if method is not None:
        for plugin in plugins:  # the counts depend on what they will add
            plugin.setup(backbone)
        depth, patches = len(backbone.blocks), backbone.patch_embed.num_patches
        keep = official_counts(method, rates, blocks, patches, plugins, depth)
        schedule = {"name": "per_block", "keep": keep, "strict": False}
        reducer = {"name": method}
        if method == "dpcknn":
            reducer["neighbors"] = int(args.get("k_neighbors", 5))
            reducer["equal_weight"] = bool(args.get("equal_weight", False))
        if method == "ats":
            reducer = padded_ats(plugins)
    model = zoo.wrap(backbone, reducer, schedule, plugins).eval()
    _load_parts(model, weights, learned)
    return model


def _backbone(fx: Fixture, weights: dict[str, Tensor]) -> nn.Module:
    module, _, name = fx.info["timm_class"].rpartition(".")
    if not module.startswith("timm.models."):
        raise Unsupported(f"not a timm class: {fx.info['timm_class']!r}")
    kwargs = dict(fx.info["timm_kwargs"])
    found = re.search(r"eps ([\d.e-]+)", fx.info.get("norm_layer", ""))
    if found:
        kwargs["norm_layer"] = partial(nn.LayerNorm, eps=float(found[1]))
    backbone = getattr(importlib.import_module(module), name)(**kwargs)
    own = ("clca.", "reducer.")
    backbone.load_state_dict({k: v for k, v in weights.items() if not k.startswith(own)})
    return backbone


def _load_parts(model: ReducedViT, weights: dict[str, Tensor], learned: str) -> None:
    """Put the fixture's weights of plugins and reducer under our names."""
    found: dict[str, Tensor] = {}
    for i, plugin in enumerate(model.plugins):
        parts = ("clc.", "cla.net.") if isinstance(plugin, CLCA) else ("", "net.")
        for official, ours in zip(("clca.", "clca.cla."), parts, strict=True):
            for key, value in weights.items():
                if key.startswith(official):
                    found[f"plugins.{i}.{ours}{key.removeprefix(official)}"] = value
        net = getattr(getattr(plugin, "cla", plugin), "net", None)
        if isinstance(net, LayerMixHead):
            found |= _by_shape(f"plugins.{i}.{parts[1]}", net, weights)
    for key, value in weights.items():
        if learned and key.startswith(f"reducer.{learned}."):
            found[f"reducer.stages.{key.removeprefix(f'reducer.{learned}.')}"] = value
    wanted = {k for k in model.state_dict() if not k.startswith("backbone.")}
    missing = sorted(k for k in wanted - set(found) if not k.endswith("num_batches_tracked"))
    if missing:
        raise Unsupported(f"the fixture holds no weights for {missing[:3]}")
    model.load_state_dict({k: v for k, v in found.items() if k in wanted}, strict=False)


def _by_shape(prefix: str, net: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of the older head, whose parts all differ in shape, whatever they are called."""
    mine = {k: v for k, v in weights.items() if k.startswith("clca.") and ".clr" not in k}
    found = {}
    for name, want in net.state_dict().items():
        kind = name.rpartition(".")[2]
        same = [v for k, v in mine.items() if k.endswith(kind) and v.shape == want.shape]
        if len(same) == 1:
            found[prefix + name] = same[0]
    return found


def padded_ats(plugins: list[Plugin]) -> reduction.Reducer:
    """ATS with padding rows like the official ones, and plugins that average them too.

    There a padding row is a copy of the class token that attends evenly in later blocks, and the
    cache's average counts it. Here nothing reads padding.
    """
    for plugin in plugins:
        cache = getattr(plugin, "clc", plugin)
        if isinstance(cache, CLC):
            cache._average = lambda t, first, stop: t.x[:, first:stop].mean(1, keepdim=True)
    ats: Any = reduction.create("ats")
    attend = ats.attend

    def padded(a: AttentionInput, t: Tokens, step: Step | None) -> AttentionOutput | None:
        answer = attend(a, t, step)
        if answer is None:
            if t.mask is None:
                return None
            out, seen = run_attention(a)
            return AttentionOutput(_fill(out, t.mask, a.v.mean(2, keepdim=True)), seen)
        kept = answer.tokens
        if kept is None or kept.mask is None:
            return answer
        x = torch.where(kept.mask.unsqueeze(-1), kept.x, kept.x[:, :1])
        out = _fill(answer.out, kept.mask, answer.out[:, :, :1])
        return answer._replace(out=out, tokens=kept._replace(x=x))

    ats.attend = padded
    return ats


def _fill(out: Tensor, mask: Tensor, otherwise: Tensor) -> Tensor:
    return torch.where(mask[:, None, :, None], out, otherwise)
