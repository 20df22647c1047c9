"""A-ViT: halting masks, answers, the ponder loss and the prior."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

import zoo
from reduction.methods.avit import prior_divergence, prior_target
from tests.parity.fixture import Case, Fixture, gradient_check
from tests.parity.learned import compare_gradients
from tests.parity.runner import handles
from zoo.model.reduced import ReducedViT
from zoo.model.stream import Info

UNLIMITED = {"name": "keep_rate", "rate": 1.0}


def build(fx: Fixture) -> ReducedViT:
    """The fixture's model; every key that its configuration can carry."""
    config = fx.config
    reducer = {
        "name": "avit",
        "scale": config["gate_scale"],
        "center": config["gate_center"],
        "eps": config["eps"],
        "ponder_weight": config.get("ponder_token_scale", 5e-4),
        "prior_weight": config.get("distr_prior_alpha", 1e-3),
        "prior_depth": config.get("prior_depth"),
        "compat": "official",
    }
    return zoo.wrap(fx.backbone(), reducer, UNLIMITED).eval()


def active(info: Info) -> Tensor:
    """Which tokens take part in each block, `(L, B, P+N)`; in the first, all do."""
    first = info.trace[0]
    batch, total = first.memory["ponder"].shape
    masks = [torch.ones(batch, total, dtype=torch.bool)]
    for t in info.trace[:-1]:
        alive = torch.ones_like(t.size, dtype=torch.bool) if t.mask is None else t.mask
        empty = torch.zeros(batch, total, dtype=torch.bool)
        masks.append(empty.scatter(1, t.memory["rows"], alive))
    return torch.stack(masks)


def check(case: Case, fx: Fixture, info: Info) -> None:
    """Masks, counts, and what every token spent."""
    stored, ours = fx.group("avit."), active(info)
    # When the class token has halted, evaluation stops: what goes on there is not seen.
    seen = stored["active"] & stored["active"][:, :, :1]
    case.equal("active", ours & ours[:, :, :1], seen)
    for i, t in enumerate(info.trace):
        cls = t.x[:, 0] * ours[i, :, :1]
        case.close(f"block{i}.cls", cls, fx.tensors[f"block{i}.cls"], fx.tolerance("features"))
    whole = bool(stored["active"][:, :, 0].all())
    memory, tol = info.final.memory, fx.tolerance("features")
    if whole:
        case.equal("counts.attn_in", ours.sum(2), fx.tensors["counts.attn_in"])
        case.close("rho", memory["ponder"], stored["rho"], tol)
        # The last block counts as survived only by those that never stopped.
        case.equal("counter", memory["blocks"], stored["counter"])
    case.close("pooled_cls", memory["answer"][:, 0], stored["pooled_cls"], tol)


@handles("avit", "avit (training loss)")
def avit(fx: Fixture) -> Iterator[Case]:
    model = build(fx)
    case = Case(fx.name, "eval")
    with torch.no_grad():
        dense = model.backbone(fx.images)
        logits, info = model(fx.images, return_info="trace")
        single = torch.cat([model(fx.images[i : i + 1]) for i in range(len(fx.images))])
    case.close("dense_logits", dense, fx.tensors["dense_logits"], fx.tolerance("dense_logits"))
    case.logits("logits", logits, fx.tensors["logits"], fx.tolerance("logits"))
    case.close("alone", single, logits, (1e-4, 1e-4))
    check(case, fx, info)
    yield case
    if "train.loss" in fx.tensors:
        yield training(fx, model.train())
    elif fx.group("grad."):
        case = Case(fx.name, "grad")
        logits = model(fx.images)
        case.logits("logits", logits, fx.tensors["logits"], fx.tolerance("logits"))
        gradient_check(case, fx, logits, model.backbone.named_parameters())
        yield case


def training(fx: Fixture, model: ReducedViT) -> Case:
    """The losses. The release also averages meaningless scores of tokens that have halted.

    Where tokens are really removed there are none, so these scores are computed here, for the
    comparison of the prior alone; the loss and its gradients are the method's own.
    """
    case, config, stored = Case(fx.name, "train"), fx.config, fx.group("train.")
    labels = fx.tensors["labels"]
    logits, info = model(fx.images, return_info="trace")
    case.logits("logits", logits, fx.tensors["logits"], fx.tolerance("logits"))
    ce = F.cross_entropy(logits, labels)
    case.close("ce", ce.reshape(1), stored["ce"], (1e-5, 1e-5))
    losses = model.auxiliary_losses(info, logits, labels)
    ponder = info.final.memory["ponder"].mean()
    case.close("ponder", ponder.reshape(1), stored["ponder_mean_rho"], (1e-4, 1e-5))
    target = prior_target(
        model.depth, config["prior_depth"], "official", 1 - config["prior_buffer"]
    )
    case.close("prior_target", target, stored["prior_target"], (1e-5, 1e-5))
    scores = released_scores(model, fx)
    halting = scores[:, 1:].mean((1, 2))
    case.close("halting_per_layer", halting, stored["halting_per_layer"], (1e-5, 1e-5))
    kl = prior_divergence(halting, target)
    case.close("kl", kl.reshape(1), stored["kl"], (1e-5, 1e-5))
    # Of the tokens that are alive ours are the same scores.
    alive = active(info)[:, 1:]
    ours = model.reducer.halting(model.outcome(info, logits, labels))
    same = (scores[:, 1:] * alive).sum((1, 2)) / alive.sum((1, 2))
    case.close("halting of the living", ours, same, (1e-4, 1e-4))
    exact = ce + losses["ponder"] + config["distr_prior_alpha"] * kl
    case.close("loss", exact.reshape(1), stored["loss"], (1e-5, 1e-5))
    (ce + sum(losses.values())).backward()
    compare_gradients(case, fx, model, {})
    return case


@torch.no_grad()
def released_scores(model: ReducedViT, fx: Fixture) -> Tensor:
    """Halting scores `(L, B, N)` where halted rows are masked and not removed, as released."""
    m, reducer = model.backbone, model.reducer
    x = m._pos_embed(m.patch_embed(fx.images))
    batch, n, width = x.shape
    total, alive = torch.zeros(batch, n), torch.ones(batch, n)
    scores = []
    for i, block in enumerate(m.blocks):
        x = x * alive.unsqueeze(-1)
        attn = block.attn
        qkv = attn.qkv(block.norm1(x) * alive.unsqueeze(-1))
        q, k, v = qkv.reshape(batch, n, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
        map_ = (q * attn.scale) @ k.transpose(-2, -1) - 1000 * (1 - alive)[:, None, None]
        out = (map_.softmax(-1) @ v).transpose(1, 2).reshape(batch, n, width)
        x = x + attn.proj(out)
        x = x + block.mlp(block.norm2(x) * alive.unsqueeze(-1))
        p = (reducer.scale * x[..., 0] - reducer.center).sigmoid()
        scores.append(p)
        total = total + (p if i < len(m.blocks) - 1 else 1)
        alive = alive * (total < 1 - reducer.eps)
    return torch.stack(scores)
