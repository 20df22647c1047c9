"""Learned thresholds: merging, pruning, or both."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

import zoo
from reduction.functional import thresholds
from tests.parity.fixture import Case, Fixture, Unsupported, gradient_check
from tests.parity.learned import check_alone
from tests.parity.runner import handles
from tests.parity.stages import check_blocks, evaluated
from zoo.model.reduced import ReducedViT
from zoo.model.stream import Info

METHODS = ("ltmp", "ltm", "ltp")
NAMES = {"merge_threshold": "merge_masker", "prune_threshold": "prune_masker"}


def _build(fx: Fixture, **options: Any) -> ReducedViT:
    name = str(fx.config.get("variant", fx.method.split()[0])).lower()
    if name not in METHODS:
        raise Unsupported(f"variant {name!r} is none of {METHODS}")
    reducer = {"name": name, "tau": fx.config.get("tau", 0.1), "limit": False, **options}
    depth = fx.info["timm"]["kwargs"]["depth"]
    model = zoo.wrap(fx.backbone(), reducer, {"name": "per_block", "keep": [None] * depth})
    state = {}
    for ours, theirs in NAMES.items():
        stored = [f"reducer.blocks.{i}.{theirs}.threshold" for i in range(depth)]
        if stored[0] in fx.tensors:
            state[ours] = torch.cat([fx.tensors[key].float() for key in stored])
    model.reducer.load_state_dict(state)
    return model


def _live(info: Info, block: int) -> torch.Tensor:
    """Tokens of each image behind a block, prefix included."""
    t = info.trace[block]
    if t.mask is None:
        return torch.full((t.x.shape[0],), t.x.shape[1])
    return t.mask.sum(1)


@handles(*METHODS)
def inference(fx: Fixture) -> Iterator[Case]:
    model = _build(fx).eval()
    case, info = evaluated(fx, model)
    depth = len(info.trace)
    leaving = torch.stack([_live(info, i) for i in range(depth)])
    entering = torch.cat([torch.full_like(leaving[:1], info.tokens[0][0]), leaving[:-1]])
    case.equal("counts.attn_in", entering, fx.tensors["counts.attn_in"])
    case.equal("counts.mlp_in", leaving, fx.tensors["counts.mlp_in"])
    for i, t in enumerate(info.trace):
        stored = fx.group(f"block{i}.")
        if "source" in stored:
            case.equal(f"block{i}.slots", t.source, stored["source"])
    classes = Fixture(fx.path)
    classes.__dict__["tensors"] = {k: v for k, v in fx.tensors.items() if ".source" not in k}
    check_blocks(case, classes, model, info)
    check_alone(case, model, fx.images, fx.tensors["logits"])
    yield case
    if fx.group("grad."):
        case = Case(fx.name, "grad")
        logits = model(fx.images)
        case.logits("logits", logits, fx.tensors["logits"], fx.tolerance("logits"))
        gradient_check(case, fx, logits, model.backbone.named_parameters())
        yield case


@handles(*(f"{name} (training)" for name in METHODS))
def training(fx: Fixture) -> Iterator[Case]:
    config = fx.config
    model = _build(
        fx,
        variant="release",
        budget_weight=config["reg_scale"],
        target=config["reduction_target"],
    ).train()
    labels, case = fx.tensors["labels"], Case(fx.name, "train")
    with torch.no_grad():
        dense = model.backbone(fx.images)
    case.close("dense_logits", dense, fx.tensors["dense_logits"], fx.tolerance("dense_logits"))
    logits, info = model(fx.images, return_info="trace")
    case.logits("logits", logits, fx.tensors["logits"], fx.tolerance("logits"))
    for i, t in enumerate(info.trace):
        stored = fx.tensors[f"block{i}.mask"].float()
        case.equal(f"block{i}.mask", (t.policy > 0.5).float(), stored)
    ce = F.cross_entropy(logits, labels)
    budget = model.auxiliary_losses(info, logits, labels)["budget"]
    length = info.tokens[0][0]
    shares = [t.policy.mean() for t in info.trace]
    ratio = thresholds.cost_ratio(shares, length, model.backbone.embed_dim)
    parts = {
        "ce": ce,
        "flops_ratio": ratio,
        "reg": budget / config["reg_scale"],
        "loss": ce + budget,
    }
    for name, stored in fx.group("train.").items():
        case.close(f"train.{name}", parts[name].reshape(1), stored, (1e-4, 1e-4))
    (ce + budget).backward()
    gradients(case, fx, model)
    yield case


def gradients(case: Case, fx: Fixture, model: ReducedViT) -> None:
    """Stored gradients and norms, those of the thresholds block by block."""
    tol = fx.tolerance("grad")
    grads = {name: p.grad for name, p in model.backbone.named_parameters()}
    for ours, theirs in NAMES.items():
        parameter = getattr(model.reducer, ours)
        for i in range(0 if parameter is None else len(parameter)):
            grads[f"blocks.{i}.{theirs}.threshold"] = parameter.grad[i : i + 1]
    for name, value in fx.group("grad.").items():
        case.close(f"grad {name}", grads[name], value, tol)
    for name, norm in fx.info["gradients"]["param_grad_norms"].items():
        grad = grads[name]
        if norm is None:
            case.equal(f"grad norm {name}", grad is None or float(grad.norm()) == 0.0, True)
        else:
            case.close(f"grad norm {name}", grad.norm(), torch.tensor(norm), tol)
