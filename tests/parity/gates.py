"""IdleViT and AS-ViT: tokens that rest, and tokens below a threshold."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

import zoo
from tests.parity.adaptive import rows_left
from tests.parity.fixture import Case, Fixture
from tests.parity.learned import check_alone, compare_gradients
from tests.parity.runner import handles
from tests.parity.stages import check_blocks, evaluated


@handles("idlevit")
def idlevit(fx: Fixture) -> Iterator[Case]:
    config, depth = fx.config, fx.info["timm"]["kwargs"]["depth"]
    keep: list[int | None] = [None] * depth
    patches = fx.backbone().patch_embed.num_patches
    for block, ratio in zip(config["idle_blocks"], config["keep_ratios"], strict=True):
        keep[block] = int(patches * ratio)
    reducer = {"name": "idlevit", "distill_weight": 0.0, "compat_every_second": True}
    model = zoo.wrap(fx.backbone(), reducer, {"name": "per_block", "keep": keep}).eval()
    case, info = evaluated(fx, model)
    check_blocks(case, fx, model, info)
    tol = fx.tolerance("features")
    for i, t in enumerate(info.trace):
        stored = fx.group(f"block{i}.")
        if "selected" in stored:
            case.equal(f"block{i}.selected", t.memory["chosen"], stored["selected"])
        if "tokens" in stored:
            case.close(f"block{i}.tokens", t.x, stored["tokens"], tol)
    yield case
    if "train.loss" not in fx.tensors:
        return
    case, stored = Case(fx.name, "train"), fx.group("train.")
    labels = fx.tensors["labels"]
    model.train()
    logits, info = model(fx.images, return_info="trace")
    case.logits("logits", logits, stored["logits"], (1e-4, 1e-4))
    ce = F.cross_entropy(logits, labels)
    case.close("ce", ce.reshape(1), stored["ce"], (1e-4, 1e-4))
    cut = info.final.memory["cut"]
    case.close("inter", cut[:, 0], stored["inter"], (1e-5, 1e-4))
    case.close("intra", cut[:, 1], stored["intra"], (1e-5, 1e-4))
    loss = ce + model.auxiliary_losses(info, logits, labels)["cut"]
    case.close("loss", loss.reshape(1), stored["loss"], (1e-4, 1e-4))
    model.reducer.compat_every_second = False
    whole = ce + model.auxiliary_losses(info, logits, labels)["cut"]
    case.close("loss_all_blocks", whole.reshape(1), stored["loss_all_blocks"], (1e-4, 1e-4))
    loss.backward()
    compare_gradients(case, fx, model, {})
    yield case


@handles("asvit")
def asvit(fx: Fixture) -> Iterator[Case]:
    config, depth = fx.config, fx.info["timm"]["kwargs"]["depth"]
    patches = fx.backbone().patch_embed.num_patches
    reducer = {
        "name": "asvit",
        "accumulate": config["accumulate"],
        "beta": config.get("beta", 0.99),
        "first": config.get("first_scored_block", 2),
        "limit": False,
    }
    # The counts are no limit here: they say where tokens leave.
    keep = [patches - 1 if b in config["pruning_blocks"] else None for b in range(depth)]
    model = zoo.wrap(fx.backbone(), reducer, {"name": "per_block", "keep": keep}).eval()
    stored = fx.tensors.get("thresholds", torch.tensor(config["thresholds"]))
    model.reducer.load_state_dict({"thresholds": stored.float()})
    case, info = evaluated(fx, model)
    counts, tol = rows_left(info), fx.tolerance("features")
    case.equal("counts", counts, fx.tensors["counts"])
    for b in range(len(fx.images)):
        for block in config["pruning_blocks"]:
            kept = (info.trace[block].source[b] >= 0).nonzero().flatten()
            case.equal(f"img{b}.block{block}.kept", kept, fx.tensors[f"img{b}.block{block}.kept"])
            score = fx.tensors[f"img{b}.block{block}.score"]
            ours = info.trace[block - 1].memory["score"][b, : len(score)]
            case.close(f"img{b}.block{block}.score", ours, score, (1e-5, 1e-4))
        name = f"img{b}.final_tokens"
        if name in fx.tensors:
            x = info.final.x[b, : int(counts[b, -1])]
            pair = (x, model.backbone.norm(x))
            near = min(pair, key=lambda y: (y - fx.tensors[name]).abs().max().item())
            case.close(name, near, fx.tensors[name], tol)
    check_alone(case, model, fx.images, fx.tensors["logits"])
    yield case


@handles("adavit")
def adavit(fx: Fixture) -> Iterator[Case]:
    config, depth = fx.config, fx.info["timm"]["kwargs"]["depth"]
    names = ("keep_layers", "token_threshold", "head_threshold", "layer_threshold")
    reducer = {"name": "adavit", **{k: config[k] for k in names if k in config}}
    model = zoo.wrap(fx.backbone(), reducer, {"name": "per_block", "keep": [None] * depth}).eval()
    model.reducer.load_state_dict({k: v.float() for k, v in fx.group("reducer.").items()})
    case, info = evaluated(fx, model)
    check_blocks(case, fx, model, info)
    memory, first = info.final.memory, config.get("keep_layers", 1)
    # The class token, which always takes part, is stored as well.
    case.equal(
        "tokens",
        memory["adavit.all.tokens"].transpose(0, 1),
        fx.tensors["token_select"][:, :, 1:].float(),
    )
    for kind, name in (("heads", "head_select"), ("layers", "layer_select")):
        ours = memory[f"adavit.all.{kind}"][first:].transpose(0, 1)
        case.equal(kind, ours, fx.tensors[name].float())
    check_alone(case, model, fx.images, fx.tensors["logits"])
    yield case
