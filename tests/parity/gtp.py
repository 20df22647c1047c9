"""GTP: the official code, with its graph, kept patches and scales."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch

import zoo
from reduction.tokens import Tokens
from tests.parity.fixture import Case, Fixture, Unsupported, gradient_check
from tests.parity.runner import handles
from tests.parity.stages import check_blocks, check_counts, evaluated
from zoo.adapters.tower import tower_of
from zoo.model.reduced import ReducedViT
from zoo.model.stream import Info

PROPAGATION = {"GraphProp": "graph", "Mean": "mean", "None": "none", None: "none"}


def arguments(config: dict[str, Any]) -> dict[str, Any]:
    """Their names as ours."""
    selection = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", config["selection"]).lower()
    selection = selection.replace("clsattn", "cls_attn").replace("imgattn", "img_attn")
    if selection == "random":
        raise Unsupported("random selection has no reproducible reference")
    return {
        "name": "gtp",
        "selection": selection,
        "propagation": PROPAGATION[config.get("propagation", "GraphProp")],
        "graph": config.get("graph_type", "Mixed").lower(),
        "neighbours": int(config.get("num_neighbours", 0)),
        "alpha": float(config.get("alpha", 0.1)),
        "sparsity": float(config.get("sparsity", 1.0)),
        "token_scale": bool(config.get("token_scale", False)),
    }


@handles("gtp")
def gtp(fx: Fixture) -> Iterator[Case]:
    drop = fx.config["num_prop"]
    drop = [int(d) for d in drop] if isinstance(drop, list | tuple) else int(drop)
    schedule = {"name": "constant_r", "r": drop, "strict": False}
    model = zoo.wrap(fx.backbone(), arguments(fx.config), schedule).eval()
    case, info = evaluated(fx, model)
    check_counts(case, fx, model, info)
    check_blocks(case, fx, model, info)
    check_kept(case, fx, model, info)
    yield case
    if fx.group("grad."):
        case = Case(fx.name, "grad")
        logits = model(fx.images)
        case.logits("logits", logits, fx.tensors["logits"], fx.tolerance("logits"))
        gradient_check(case, fx, logits, model.backbone.named_parameters())
        yield case


def check_kept(case: Case, fx: Fixture, model: ReducedViT, info: Info) -> None:
    """The graph of the embedded patches; kept patches and scales in ascending order."""
    if "graph" in fx.tensors:
        with torch.no_grad():
            x = model.backbone.norm_pre(tower_of(model.backbone).embed(model.backbone, fx.images).x)
        t = Tokens.start(x, model.prefix)
        ours = model.reducer._graph(t, info.grid).expand(x.shape[0], -1, -1)
        case.close("graph", ours, fx.tensors["graph"], (1e-6, 1e-5))
    for i, t in enumerate(info.trace):
        stored = fx.group(f"block{i}.")
        kept, order = t.origin.sort(dim=1)
        if "kept_abs" in stored:
            case.equal(f"block{i}.kept_abs", kept, stored["kept_abs"])
        if "scales_sorted" in stored:
            size = torch.cat([t.size[:, : t.prefix], t.patch_size.gather(1, order)], dim=1)
            case.close(f"block{i}.scales", size, stored["scales_sorted"], (1e-4, 1e-4))
