"""MCTF: evaluation and the losses of training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

import zoo
from reduction.mixins.consistency import class_gap
from tests.parity.fixture import Case, Fixture, gradient_check
from tests.parity.runner import handles
from tests.parity.stages import check_blocks, check_counts

POOLING = {0: "size", 1: "attention", 2: "max", 3: "mean"}


def counts(fx: Fixture) -> list[int | None]:
    """Patches left by each block, in the reference's arithmetic."""
    config, kwargs = fx.config, fx.info["timm"]["kwargs"]
    rows = (kwargs["img_size"] // kwargs["patch_size"]) ** 2 + 1
    active = config["activate_layer"]
    out: list[int | None] = []
    for block in range(kwargs["depth"]):
        r = config["r"] if block in active else 0
        if rows - r < 10:
            r = max(0, rows - 10)
        rows -= min(int((rows - 1) * r) if r < 1 else int(r), (rows - 1) // 2)
        out.append(rows - 1)
    return out


def reducer(config: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": "mctf",
        "osa": config.get("one_step_ahead", 1),
        "tau_sim": config.get("tau_sim", 1),
        "tau_info": config.get("tau_info", 20),
        "tau_size": config.get("tau_size", 40),
        "both": bool(config.get("bidirection", 1)),
        "pooling": POOLING[config.get("pooling_type", 1)],
        "prop_attn": bool(config.get("prop_attn", 1)),
        "teacher_share": 0.0,  # the dense pass of the same weights
    }


@handles("mctf")
def mctf(fx: Fixture) -> Iterator[Case]:
    schedule = {"name": "per_block", "keep": counts(fx), "strict": False}
    model = zoo.wrap(fx.backbone(), reducer(fx.config), schedule)
    model.train(fx.info.get("mode") == "train")
    case = Case(fx.name, fx.info.get("mode", "eval"))
    with torch.no_grad():
        dense = model.backbone(fx.images)
        logits, info = model(fx.images, return_info="trace")
        labels = fx.tensors["labels"]
        teacher = model.peer(fx.images, labels)
        outcome = model.outcome(info, logits, labels, teacher)
    case.close("dense_logits", dense, fx.tensors["dense_logits"], fx.tolerance("dense_logits"))
    case.logits("logits", logits, fx.tensors["logits"], fx.tolerance("logits"))
    check_counts(case, fx, model, info)
    check_blocks(case, fx, model, info)
    stored = fx.group("train.")
    tol = fx.tolerance("features")
    if "loss_consistency" in stored:
        case.close("consistency", class_gap(outcome), stored["loss_consistency"], tol)
    if "x_teacher" in stored:
        case.close("teacher", teacher.logits, stored["x_teacher"], fx.tolerance("logits"))
    yield case
    if fx.group("grad."):
        case = Case(fx.name, "grad")
        logits = model(fx.images)
        case.logits("logits", logits, fx.tensors["logits"], fx.tolerance("logits"))
        gradient_check(case, fx, logits, model.backbone.named_parameters())
        yield case
