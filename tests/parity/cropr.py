"""Cropr: evaluation and training of the official code."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import zoo
from tests.parity.fixture import Case, Fixture, gradient_check
from tests.parity.learned import compare_gradients, load_parts, named
from tests.parity.runner import handles
from tests.parity.stages import check_blocks, check_counts
from zoo.model.reduced import ReducedViT
from zoo.model.stream import Info

NAMES = {"cropr.": "stages."}
FLAGS = ("pre_attn_norm", "q_proj", "k_proj", "v_proj", "mlp")


def model_of(fx: Fixture) -> ReducedViT:
    """The fixture's model; the first module drops one token more than the others."""
    config, net = fx.config, fx.backbone()
    depth = fx.info["timm"]["kwargs"]["depth"]
    llf, rate = bool(config.get("llf", True)), int(config["pruning_rate"])
    blocks = depth - 2 if llf else depth - 1
    args: dict[str, Any] = {"name": "cropr", "llf": llf}
    args |= {"queries": config.get("num_queries", 1), "heads": config.get("num_heads", 1)}
    args |= {k.replace("attn_", ""): config[k] for k in FLAGS if k in config}
    args["mlp_ratio"] = config.get("mlp_ratio", 4)
    drops = [rate + 1] + [rate] * (blocks - 1)
    model = zoo.wrap(net, args, {"name": "constant_r", "r": drops}).eval()
    # Projections of the reference may do without a bias.
    have = {name.replace("cropr.", "stages.", 1) for name in fx.group("reducer.")}
    for name, value in model.reducer.state_dict().items():
        if name not in have and name.endswith("proj.bias"):
            fx.tensors[f"reducer.{name.replace('stages.', 'cropr.', 1)}"] = torch.zeros_like(value)
    load_parts(model, fx, NAMES)
    return model


def patches(t: Any) -> list[list[int]]:
    """Patches that are still there, per image."""
    return [[p for p, slot in enumerate(row) if slot >= 0] for row in t.source.tolist()]


def check_choices(case: Case, fx: Fixture, info: Info) -> None:
    """Kept and dropped patches of every module."""
    before = [list(range(info.source.shape[1]))] * info.source.shape[0]
    for stage, block in enumerate(fx.info["stage_blocks"]):
        stored, now = fx.group(f"stage{stage}."), patches(info.trace[block])
        case.equal(f"stage{stage}.kept", now, stored["kept_abs"].tolist())
        gone = [sorted({*old} - {*new}) for old, new in zip(before, now, strict=True)]
        case.equal(f"stage{stage}.dropped", gone, stored["dropped_abs"].tolist())
        before = now


def check_all(case: Case, fx: Fixture, model: ReducedViT, logits: Tensor, info: Info) -> None:
    """Logits, counts, class tokens and choices."""
    case.logits("logits", logits, fx.tensors["logits"], fx.tolerance("logits"))
    check_counts(case, fx, model, info)
    check_blocks(case, fx, model, info)
    check_choices(case, fx, info)


@handles("cropr")
def evaluation(fx: Fixture) -> Iterator[Case]:
    model = model_of(fx)
    case = Case(fx.name, "eval")
    with torch.no_grad():
        dense = model.backbone(fx.images)
        logits, info = model(fx.images, return_info="trace")
    case.close("dense_logits", dense, fx.tensors["dense_logits"], fx.tolerance("dense_logits"))
    check_all(case, fx, model, logits, info)
    yield case
    if fx.group("grad."):
        case = Case(fx.name, "grad")
        stored = fx.tensors.get("grad.loss")
        logits = model(fx.images)
        if stored is not None:
            loss = F.cross_entropy(logits, fx.tensors["labels"])
            case.close("loss", loss.reshape(1), fx.tensors.pop("grad.loss"), fx.tolerance("grad"))
        case.logits("logits", logits, fx.tensors["logits"], fx.tolerance("logits"))
        gradient_check(case, fx, logits, named(model, NAMES))
        yield case


@handles("cropr (training)")
def training(fx: Fixture) -> Iterator[Case]:
    model = model_of(fx).train()
    case = Case(fx.name, "train")
    logits, info = model(fx.images, return_info="trace")
    check_all(case, fx, model, logits, info)
    for stage in range(len(fx.info["stage_blocks"])):
        stored = fx.tensors[f"stage{stage}.aux_logits"]
        answer = info.final.memory[f"aux.{stage}"]
        answer = answer[:, 0] if stored.dim() == 2 else answer
        case.close(f"stage{stage}.aux_logits", answer, stored, fx.tolerance("logits"))
    yield case
    case = Case(fx.name, "grad")
    labels = fx.tensors["labels"]
    own = model.auxiliary_losses(info, logits, labels)
    loss = F.cross_entropy(logits, labels) + sum(own.values())
    loss.backward()
    tol = fx.tolerance("grad")
    case.logits("loss", loss.reshape(1), fx.tensors.pop("grad.loss"), tol)
    compare_gradients(case, fx, model, NAMES)
    yield case
