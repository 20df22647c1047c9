"""Evo-ViT: stages, layers with the training loss, and the whole slow-fast scheme."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

import zoo
from tests.parity.fixture import Case, Fixture, gradient_check
from tests.parity.learned import load_parts, named
from tests.parity.runner import handles
from tests.parity.stages import check_blocks, check_counts, evaluated
from zoo.model.reduced import ReducedViT
from zoo.model.stream import Info

NAMES = {"head_cls.": "head.", "norm_cls.": "norm."}


def build(fx: Fixture, fast: str) -> ReducedViT:
    """The fixture's model; every key that its configuration can carry."""
    config, depth = fx.config, fx.info["timm"]["kwargs"]["depth"]
    mode = config.get("mode", "stage")
    patches = fx.backbone().patch_embed.num_patches
    if "stages" in config:
        first = [start for start, _ in config["stages"]]
        shares = dict(zip(first, config["stage_ratio"], strict=True))
        tradeoff: Any = config["alpha"]
    else:
        first = [b for b in fx.info["stage_blocks"] if config["prune_ratio"][b] != 1]
        shares = {b: config["prune_ratio"][b] for b in first}
        tradeoff = config["tradeoff"]
    keep = [int(patches * shares[b]) if b in shares else None for b in range(depth)]
    reducer = {
        "name": "evovit",
        "mode": mode,
        "fast": fast,
        "tradeoff": tradeoff,
        "drop_last": bool(config.get("prunecls", False)),
        "head_weight": 1.0 if fx.group("reducer.") else 0.0,
    }
    model = zoo.wrap(fx.backbone(), reducer, {"name": "per_block", "keep": keep}).eval()
    load_parts(model, fx, NAMES)
    return model


def check_slow(case: Case, fx: Fixture, info: Info) -> None:
    """Patches on the slow path, in the block or, where they are back already, behind it."""
    for stage, block in enumerate(fx.info["stage_blocks"]):
        memory = info.trace[block].memory
        slow = memory["slow"] if "slow" in memory else memory["chosen"]
        case.equal(f"stage{stage}.slow", slow.sort(1).values, fx.tensors[f"stage{stage}.slow_abs"])


def run(fx: Fixture, fast: str) -> Iterator[Case]:
    model = build(fx, fast)
    case, info = evaluated(fx, model)
    check_counts(case, fx, model, info)
    check_blocks(case, fx, model, info)
    check_slow(case, fx, info)
    yield case
    if "train.cls_logits" in fx.tensors or fx.group("grad."):
        yield training(fx, model)


def training(fx: Fixture, model: ReducedViT) -> Case:
    """The paper's loss is half of the sum that is minimised here."""
    case = Case(fx.name, "train")
    labels = fx.tensors["labels"]
    logits, info = model(fx.images, return_info="trace")
    case.logits("logits", logits, fx.tensors["logits"], fx.tolerance("logits"))
    if "train.cls_logits" not in fx.tensors:
        gradient_check(case, fx, logits, model.backbone.named_parameters())
        return case
    second = model.reducer.second_logits(info.trace[-1])
    case.logits("cls_logits", second, fx.tensors["train.cls_logits"], fx.tolerance("logits"))
    losses = model.auxiliary_losses(info, logits, labels)
    loss = (F.cross_entropy(logits, labels) + sum(losses.values())) / 2
    case.close("loss", loss.reshape(1), fx.tensors["train.loss"], (1e-5, 1e-5))
    loss.backward()
    tol, parameters = fx.tolerance("grad"), dict(named(model, NAMES))
    for name, value in fx.group("grad.").items():
        case.close(f"grad {name}", parameters[name].grad, value, tol)
    total = fx.info["gradients"].get("grad_norm_total")
    if total is not None:
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        norm = torch.stack([g.norm() for g in grads]).norm()
        case.close("grad norm", norm, torch.tensor(total), tol)
    return case


@handles("evovit", "evovit (training)")
def released(fx: Fixture) -> Iterator[Case]:
    yield from run(fx, "park")


@handles("evovit full")
def full(fx: Fixture) -> Iterator[Case]:
    yield from run(fx, "update")
