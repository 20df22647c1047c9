"""The stage-wise methods of Haurum et al.'s comparison code, and what is official of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

import zoo
from reduction.methods import dynamicvit as dynamic
from reduction.methods.sit import ReverseSlimming, TokenSlimming, recalibration_loss
from tests.parity.fixture import Case, Fixture
from tests.parity.learned import (
    Names,
    cases,
    check_alone,
    check_ragged,
    compare_gradients,
    counts_or_rate,
    load_parts,
    rate_or_shares,
)
from tests.parity.runner import handles
from tests.parity.stages import check_stages

CLUSTER = {"cluster_layers.": "stages."}
SCORE = {"score_predictor.": "stages."}


def soft(fx: Fixture, reducer: dict[str, Any], names: Names) -> Iterator[Case]:
    """Methods that mix: the tokens behind each stage, in order."""
    for case, _, info in cases(fx, reducer, names, counts_or_rate(fx)):
        for stage, block in enumerate(fx.info["stage_blocks"] if info is not None else ()):
            stored = fx.group(f"stage{stage}.").get("tokens_after_block")
            if stored is not None:
                x = info.trace[block].x
                case.close(f"stage{stage}.tokens", x, stored, fx.tolerance("features"))
        yield case


@handles("patchmerger")
def patchmerger(fx: Fixture) -> Iterator[Case]:
    yield from soft(fx, {"name": "patchmerger"}, CLUSTER)


@handles("sinkhorn")
def sinkhorn(fx: Fixture) -> Iterator[Case]:
    args = {"eps": fx.config["sinkhorn_eps"], "iterations": fx.config["cluster_iters"]}
    yield from soft(fx, {"name": "sinkhorn", **args}, CLUSTER)


@handles("sit")
def sit(fx: Fixture) -> Iterator[Case]:
    yield from soft(fx, {"name": "sit"}, CLUSTER)


@handles("sit (official modules)")
def sit_modules(fx: Fixture) -> Iterator[Case]:
    config = fx.config
    slim = TokenSlimming(config["dim"], config["K"], config["tsm_hidden_ratio"])
    slim.load_state_dict({k: v.float() for k, v in fx.group("tsm.").items()})
    back = ReverseSlimming(config["dim"], config["K"], config["N"], config["rtsm_ratio"])
    renamed = {k.replace("fc1", "0").replace("fc2", "2"): v for k, v in fx.group("rtsm.").items()}
    back.load_state_dict({k: v.float() for k, v in renamed.items()})
    case = Case(fx.name, "modules")
    with torch.no_grad():
        y = slim(fx.tensors["x"]) @ fx.tensors["x"]
        case.logits("slim", y, fx.tensors["slim"], (1e-5, 1e-5))
        case.logits("recovered", back(y), fx.tensors["recovered"], (1e-5, 1e-5))
    yield case
    layers = range(len(fx.group("student_tokens.")))
    student = [fx.tensors[f"student_tokens.{i}"] for i in layers]
    teacher = [fx.tensors[f"teacher_tokens.{i}"] for i in layers]
    mine, theirs = fx.tensors["student_logits"], fx.tensors["teacher_logits"]
    ce = F.cross_entropy(mine, fx.tensors["labels"])
    for name, stored in fx.info["losses"].items():
        case = Case(fx.name, name)
        ours = recalibration_loss(student, teacher, mine, theirs, float(name.removeprefix("tau")))
        token = config["lambda_token"] * ours["token"]
        logits = config["lambda_logits"] * ours["logits"]
        parts = {"total": ce + token + logits, "cls": ce, "token": token, "logits": logits}
        for part, value in parts.items():
            case.logits(part, value.reshape(1), torch.tensor([stored[part]]), (1e-5, 1e-5))
        yield case


@handles("dpcknn")
def dpcknn(fx: Fixture) -> Iterator[Case]:
    reducer = {
        "name": "dpcknn",
        "neighbors": fx.config.get("k_neighbors", 5),
        "equal_weight": bool(fx.config.get("equal_weight", False)),
    }
    for case, _, info in cases(fx, reducer, CLUSTER, counts_or_rate(fx)):
        if info is not None:
            check_stages(case, fx, info)
        yield case


@handles("dyvit")
def dynamicvit(fx: Fixture) -> Iterator[Case]:
    for case, _, info in cases(fx, {"name": "dynamicvit"}, SCORE, rate_or_shares(fx)):
        if info is not None:
            check_stages(case, fx, info)
        yield case


@handles("dyvit (training forward)")
def dynamicvit_training(fx: Fixture) -> Iterator[Case]:
    rate, weights = fx.config["keep_rate"], fx.info["loss_weights"]
    stages = range(len(fx.config["reduction_loc"]))
    reducer = {
        "name": "dynamicvit",
        "class_weight": weights["cls_weight"],
        "ratio_weight": weights["ratio_weight"],
        "logit_weight": weights["cls_distill_weight"],
        "token_weight": weights["token_distill_weight"],
        "ratios": [rate[0] ** (s + 1) for s in stages] if len(rate) == 1 else list(rate),
    }
    model = zoo.wrap(fx.backbone(), reducer, rate_or_shares(fx))
    load_parts(model, fx, SCORE)
    model.train()
    teacher = zoo.wrap(fx.backbone(), None).eval()
    noise = iter([fx.tensors[f"stage{s}.gumbel"] for s in stages])
    original = dynamic.gumbel_noise
    dynamic.gumbel_noise = lambda shape, device: next(noise)
    try:
        logits, info = model(fx.images, return_info="trace")
    finally:
        dynamic.gumbel_noise = original
    labels = fx.tensors["labels"]
    with torch.no_grad():
        dense, seen = teacher(fx.images, return_info="trace")
        taught = teacher.outcome(seen, dense, labels)
    case = Case(fx.name, "train")
    case.logits("logits", logits, fx.tensors["train.logits"], fx.tolerance("logits"))
    for s in stages:
        kept = (info.final.memory[f"kept.{s}"] > 0.5).float()
        case.equal(f"stage{s}.keep_mask", kept, fx.tensors[f"stage{s}.keep_mask"])
    outcome = model.outcome(info, logits, labels, taught)
    tol = fx.tolerance("features")
    case.close("features", outcome.final.patches, fx.tensors["train.features"], tol)
    losses = model.reducer.auxiliary_losses(outcome)
    ce = F.cross_entropy(logits, labels) * model.reducer.class_weight
    total = ce + sum(losses.values())
    parts = {
        "ce": ce,
        "total": total,
    }
    for name, ours, weight in (
        ("ratio", "ratio", "ratio_weight"),
        ("cls_kl", "logits", "cls_distill_weight"),
        ("token_mse", "token", "token_distill_weight"),
    ):
        if weights[weight]:
            parts[name] = losses[ours] / weights[weight]
    for name, value in parts.items():
        case.close(f"loss.{name}", value.reshape(1), fx.tensors[f"loss.{name}"], (1e-4, 1e-3))
    total.backward()
    compare_gradients(case, fx, model, SCORE)
    yield case


@handles("ats")
def ats(fx: Fixture) -> Iterator[Case]:
    schedule = counts_or_rate(fx)
    if schedule["name"] == "per_block":
        # Sample counts K there, one more than the points that are taken.
        schedule["keep"] = [None if k is None else k - 1 for k in schedule["keep"]]
    yield from adaptive(fx, {"name": "ats"}, schedule)


@handles("ats (official)")
def ats_official(fx: Fixture) -> Iterator[Case]:
    model = fx.backbone()
    patches = model.patch_embed.num_patches
    keep: list[int | None] = [None] * len(model.blocks)
    for stage, block in enumerate(fx.config["ats_blocks"]):
        keep[block] = patches - 1 - stage
    reducer = {"name": "ats", "variant": "official", "points": patches}
    yield from adaptive(fx, reducer, {"name": "per_block", "keep": keep})


def adaptive(fx: Fixture, reducer: dict[str, Any], schedule: dict[str, Any]) -> Iterator[Case]:
    for case, model, info in cases(fx, reducer, {}, schedule):
        if info is not None:
            check_ragged(case, fx, info)
            check_alone(case, model, fx.images, fx.tensors["logits"])
        yield case
