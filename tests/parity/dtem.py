"""DTEM: evaluation, and training with soft merging."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import zoo
from reduction.methods.dtem import DTEM, active_tokens
from tests.parity.fixture import Case, Fixture, gradient_check
from tests.parity.runner import handles
from tests.parity.stages import check_blocks, check_counts
from zoo.model.reduced import ReducedViT


class Recording(DTEM):
    """Remembers every soft assignment."""

    seen: list[Tensor]

    def assignment(self, source: Tensor, goal: Tensor, r: int) -> Tensor:
        move = super().assignment(source, goal, r)
        self.seen.append(move.detach())
        return move


def build(fx: Fixture) -> ReducedViT:
    config = fx.config
    reducer = Recording(
        feat_dim=config.get("feat_dim"),
        prop_attn=config.get("prop_attn", True),
        neighbors=config.get("k2", 3),
        tau1=config.get("tau1", 0.1),
        tau2=config.get("tau2", 0.1),
    )
    reducer.seen = []
    schedule = {"name": "constant_r", "r": config["r"], "strict": False}
    model = zoo.wrap(fx.backbone(), reducer, schedule)
    # The reference has an embedding in every block, also where nothing is merged.
    ours = reducer.state_dict()
    for name, value in fx.group("reducer.").items():
        name = name.replace("attn.metric_layer.", "")
        if name in ours:
            ours[name] = value.float()
    reducer.load_state_dict(ours)
    return model.train(fx.info["mode"] == "train")


def named(model: ReducedViT) -> Iterator[tuple[str, Any]]:
    yield from model.backbone.named_parameters()
    for name, parameter in model.reducer.named_parameters():
        _, block, kind = name.split(".")
        yield f"reducer.blocks.{block}.attn.metric_layer.{kind}", parameter


@handles("dtem_eval", "dtem_train")
def dtem(fx: Fixture) -> Iterator[Case]:
    model = build(fx)
    case = Case(fx.name, fx.info["mode"])
    with torch.no_grad():
        dense = model.backbone(fx.images)
        logits, info = model(fx.images, return_info="trace")
    case.close("dense_logits", dense, fx.tensors["dense_logits"], fx.tolerance("dense_logits"))
    case.logits("logits", logits, fx.tensors["logits"], fx.tolerance("logits"))
    check_blocks(case, fx, model, info)
    if model.training:
        tokens = [n for n, _ in info.tokens]
        case.equal("counts.attn_in", tokens, fx.tensors["counts.attn_in"].tolist())
        active = [active_tokens(t) + t.prefix for t in info.trace]
        case.equal("counts.effective_n", active, fx.tensors["counts.effective_n"].tolist())
        for j, move in enumerate(model.reducer.seen):
            stored = fx.tensors[f"merge{j}.assign"]
            case.close(f"merge{j}.assign", move, stored, fx.tolerance("features"))
        stored = [name for name in fx.tensors if name.endswith(".assign")]
        case.equal("merges", len(model.reducer.seen), len(stored))
    else:
        check_counts(case, fx, model, info)
    yield case
    if fx.group("grad."):
        case = Case(fx.name, "grad")
        logits = model(fx.images)
        case.logits("logits", logits, fx.tensors["logits"], fx.tolerance("logits"))
        gradient_check(case, fx, logits, named(model))
        yield case
