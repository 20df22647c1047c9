"""ToCom around ToMe: the official code."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import zoo
from tests.parity.fixture import Case, Fixture, gradient_check
from tests.parity.runner import handles
from tests.parity.stages import check_blocks, check_counts
from zoo.model.reduced import ReducedViT

NAMES = {"attn.q_tocom.adapter_": "q.", "attn.v_tocom.adapter_": "v."}
RATES = 16


def ours(name: str) -> str:
    """Our name of an adapter's weight."""
    for theirs, mine in NAMES.items():
        name = name.replace(theirs, mine)
    return name


def build(fx: Fixture, source: float) -> ReducedViT:
    config = fx.config
    reducer = {"name": config["reducer"], "prop_attn": config.get("prop_attn", True)}
    schedule = {"name": "constant_r", "r": config["r_target"], "strict": False}
    dim = config["tocom_dim_total"] // RATES
    plugin = {"name": "tocom", "source": source, "dim": dim, "scale": config["tocom_scale"]}
    model = zoo.wrap(fx.backbone(), reducer, schedule, [plugin]).eval()
    state = {ours(k): v.float() for k, v in fx.group("reducer.").items()}
    model.plugins[0].load_state_dict(state)
    return model


@handles("tocom")
def tocom(fx: Fixture) -> Iterator[Case]:
    case = Case(fx.name, "eval")
    model = build(fx, fx.config["r_source"])
    with torch.no_grad():
        dense = model.backbone(fx.images)
        logits, info = model(fx.images, return_info="trace")
        plain = build(fx, fx.config["r_target"])(fx.images)
    tol = fx.tolerance("logits")
    case.close("dense_logits", dense, fx.tensors["dense_logits"], fx.tolerance("dense_logits"))
    case.logits("logits", logits, fx.tensors["logits"], tol)
    if "logits_without_compensator" in fx.tensors:
        stored = fx.tensors["logits_without_compensator"]
        case.close("logits_without_compensator", plain, stored, tol)
    check_counts(case, fx, model, info)
    check_blocks(case, fx, model, info)
    if "final_source" in fx.tensors:
        case.equal("final_source", info.source + model.prefix, fx.tensors["final_source"])
    yield case
    if fx.group("grad."):
        case = Case(fx.name, "grad")
        logits = model(fx.images)
        case.logits("logits", logits, fx.tensors["logits"], tol)
        theirs = {ours(k): k for k in fx.group("reducer.")}
        parts = [(theirs[k], p) for k, p in model.plugins[0].named_parameters()]
        gradient_check(case, fx, logits, [*model.backbone.named_parameters(), *parts])
        yield case
