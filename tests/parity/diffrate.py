"""DiffRate: removal at given counts, and the masked search with its gradients."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import timm.models.vision_transformer
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import zoo
from reduction.functional.diffrate_search import Cost, search_macs
from tests.parity.fixture import Case, Fixture
from tests.parity.runner import handles
from zoo.model.reduced import ReducedViT
from zoo.model.stream import Info


@handles("DiffRate (ICCV 2023)")
def diffrate(fx: Fixture) -> Iterator[Case]:
    backbone = _backbone(fx)
    dense = Case(fx.name, "dense")
    with torch.no_grad():
        logits = zoo.wrap(backbone, None).eval()(fx.images)
    dense.logits("logits", logits, fx.tensors["dense.logits"], _atol(fx, "dense.logits", 1e-5))
    yield dense
    names = {key.split(".")[1] for key in fx.tensors if key.startswith("eval.")}
    for name in sorted(names):
        yield _removal(fx, backbone, name)
    if "train.logits" in fx.tensors:
        yield from _search(fx, backbone)


def _backbone(fx: Fixture) -> nn.Module:
    cls = getattr(timm.models.vision_transformer, fx.info["timm_constructor"].rpartition(".")[2])
    kwargs = dict(fx.info["timm_kwargs"])
    if isinstance(kwargs.get("img_size"), list):
        kwargs["img_size"] = tuple(kwargs["img_size"])
    model = cls(**kwargs)
    model.load_state_dict({k: v.float() for k, v in fx.group("w.").items()}, strict=True)
    return model.eval()


def _atol(fx: Fixture, key: str, default: float) -> tuple[float, float]:
    """The tolerances are sentences that begin with "atol 1e-5"; several names may share one."""
    for names, text in fx.info.get("tolerances", {}).items():
        found = re.search(r"atol\s+([\d.e+-]+)", text)
        if found and key in [n.strip() for n in names.split(",")]:
            return float(found.group(1)), 0.0
    return default, 0.0


def _wrap(backbone: nn.Module, stored: dict[str, Tensor], **args: Any) -> ReducedViT:
    prune, merge = stored["prune_kept"].tolist(), stored["merge_kept"].tolist()
    schedule = {"name": "per_block", "keep": merge, "prune": prune, "prefix": 1}
    return zoo.wrap(backbone, {"name": "diffrate", **args}, schedule).eval()


def _removal(fx: Fixture, backbone: nn.Module, name: str) -> Case:
    """A case runs twice: sorted in every block as the reference, and only where it matters."""
    case = Case(fx.name, f"eval.{name}")
    stored = fx.group(f"eval.{name}.")
    tol = _atol(fx, "eval.*.logits", 2e-5)
    quick = _wrap(backbone, stored)
    model = _wrap(backbone, stored, sort_always=True)
    scores: dict[int, Tensor] = {}
    reduce = model.reducer.reduce

    def listen(t: Any, s: Any, step: Any) -> Any:
        scores[step.block] = s.cls_row.mean(1)[:, t.prefix :]
        return reduce(t, s, step)

    model.reducer.reduce = listen  # type: ignore[method-assign]
    with torch.no_grad():
        case.logits("quick logits", quick(fx.images), stored["logits"], tol)
        logits, info = model(fx.images, return_info="trace")
    case.logits("logits", logits, stored["logits"], tol)
    counts = stored["tokens_after"].tolist()
    case.equal("tokens_after", [leaving for _, leaving in info.tokens], counts)
    case.equal("quick tokens_after", [n for _, n in quick.token_counts()], counts)
    macs = zoo.profile(model, convention="diffrate").macs
    case.equal("flops", macs, int(stored["flops"]))
    if name in fx.info.get("cases", {}):
        case.equal("exact flops", macs, fx.info["cases"][name]["flops_mac_exact"])
    for i, t in enumerate(info.trace):
        case.equal(f"assign {i}", _slots(t), stored["assign"][i].long())
        case.close(f"size {i}", t.size, stored[f"size.{i}"], _atol(fx, "eval.*.size", 1e-5))
        for key, ours, tolerance in (
            (f"cls_score.{i}", scores[i], _atol(fx, "eval.*.cls_score", 5e-6)),
            (f"block_cls_out.{i}", t.x[:, 0], _atol(fx, "block_cls_out", 1e-4)),
            (f"block_out.{i}", t.x, _atol(fx, "eval.*.block_out", 1e-4)),
        ):
            if key in stored:
                case.close(key, ours, stored[key], tolerance)
    return case


def _slots(t: Any) -> Tensor:
    """Slot of every original token, class token included, -1 where it was pruned."""
    patches = torch.where(t.source >= 0, t.source + t.prefix, -1)
    return torch.cat([torch.zeros_like(patches[:, :1]), patches], 1)


def _search(fx: Fixture, backbone: nn.Module) -> Iterator[Case]:
    spec = fx.info["train"]
    stored = fx.group("train.")
    case = Case(fx.name, "train")
    tol = _atol(fx, "train.logits", 1e-4)
    quick = _searching(fx, backbone, sort_always=False)
    case.logits("quick logits", quick(fx.images), stored["logits"], tol)
    model = _searching(fx, backbone, sort_always=True)
    rates = model.reducer.rates
    logits, info = model(fx.images, return_info="trace")
    case.logits("logits", logits, stored["logits"], tol)
    found = model.reducer.searched_schedule(1)
    case.equal("prune_kept", found.prune, stored["prune_kept"].tolist())
    case.equal("merge_kept", found.keep, stored["merge_kept"].tolist())
    _check_masked(case, fx, info, stored)

    patch = fx.info["timm_kwargs"]["patch_size"]
    start, width = fx.info["tokens_incl_class"], fx.info["timm_kwargs"]["embed_dim"]
    classes = fx.info["timm_kwargs"]["num_classes"]
    ratio = fx.info["timm_kwargs"].get("mlp_ratio", 4)
    cost = Cost.of_vit(start, width, patch, model.depth, classes, ratio)
    flops = search_macs(rates().kept, rates.patches, cost)
    case.equal("flops", flops.item(), stored["flops"].item())
    ce = F.cross_entropy(logits, fx.tensors["target"])
    penalty = (flops / spec.get("flops_unit", 1e9) - spec["flops_target"]).square()
    total = ce + spec["lambda"] * penalty
    tol = _atol(fx, "train.loss_*", 1e-4)
    for key, loss in (("loss_ce", ce), ("loss_flops", penalty), ("loss_total", total)):
        case.close(key, loss.reshape(1), stored[key].reshape(1), tol)
    yield case

    vectors = [*rates.prune, *rates.merge]
    names = [f"prune.{i}" for i in range(model.depth)] + [f"merge.{i}" for i in range(model.depth)]
    for kind, loss in (("grad_ce", ce), ("grad_flops", flops), ("grad_total", total)):
        # Relative to the largest entry of each vector.
        case = Case(fx.name, f"train.{kind}", tolerance=2e-3)
        grads = torch.autograd.grad(loss, vectors, retain_graph=True, allow_unused=True)
        for name, vector, grad in zip(names, vectors, grads, strict=True):
            grad = torch.zeros_like(vector) if grad is None else grad
            theirs = stored[f"{kind}.{name}"]
            scale = theirs.abs().max().item()
            worst = case.close(name, grad, theirs, (case.tolerance * scale + 1e-9, 0.0))
            case.gap = max(case.gap, worst / scale if scale else 0.0)
        yield case


def _searching(fx: Fixture, backbone: nn.Module, sort_always: bool) -> ReducedViT:
    """The model while its rates are searched, at the fixture's logits."""
    granularity = fx.info.get("granularity", fx.info["train"].get("granularity"))
    search = {
        "granularity": granularity,
        "uncompressed": fx.info["uncompressed_blocks_in_training"],
    }
    model = zoo.wrap(
        backbone, {"name": "diffrate", "sort_always": sort_always, "search": search}, None
    )
    with torch.no_grad():
        for kind in ("prune", "merge"):
            for i, vector in enumerate(getattr(model.reducer.rates, kind)):
                vector.copy_(fx.tensors[f"train.logit.{kind}.{i}"])
    model.backbone.requires_grad_(False)
    return model.train()


def _check_masked(case: Case, fx: Fixture, info: Info, stored: dict[str, Tensor]) -> None:
    start = fx.info["tokens_incl_class"]
    for i, t in enumerate(info.trace):
        policy = torch.ones_like(t.size) if t.policy is None else t.policy.detach()
        case.equal(f"binary mask {i}", bool(((policy == 0) | (policy == 1)).all()), True)
        left = int(stored["tokens_after"][i])
        case.equal(f"unmasked {i}", policy.sum(1).tolist(), [left] * len(policy))
        case.equal(f"tokens in the tensor {i}", t.x.shape[1], start)
        size = t.size[:, :left]
        case.close(f"size {i}", size, stored[f"size.{i}"], _atol(fx, "train.size", 1e-5))
    if "final_cls" in stored:
        case.close("final_cls", info.final.x[:, 0], stored["final_cls"], (1e-4, 0.0))
