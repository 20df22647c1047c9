"""DToMe, ALGM and G2TM: merging by thresholds, every image by itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import zoo
from reduction.assignment import apply
from reduction.functional.joining import above, best_of_batch, joined, partners
from reduction.tokens import Tokens
from tests.parity.fixture import Case, Fixture
from tests.parity.learned import check_alone
from tests.parity.runner import handles
from tests.parity.stages import source_matrix
from zoo.measure.calibrate import calibrate, pairs_per_block
from zoo.model.reduced import ReducedViT
from zoo.model.stream import Info


def rows_left(info: Info) -> Tensor:
    """Rows behind every block, prefix included, `(B, L)`."""
    found = [
        torch.full((t.x.shape[0],), t.x.shape[1]) if t.mask is None else t.mask.sum(1)
        for t in info.trace
    ]
    return torch.stack(found, 1)


def check_images(case: Case, fx: Fixture, model: ReducedViT, info: Info) -> None:
    """What is stored of every image by itself."""
    tol = fx.tolerance("features")
    counts = rows_left(info)
    for b in range(len(fx.images)):
        for i, t in enumerate(info.trace):
            stored, n = fx.group(f"img{b}.block{i}."), int(counts[b, i])
            if "cls" in stored:
                case.close(f"img{b}.block{i}.cls", t.x[b, 0], stored["cls"], tol)
            if "tokens" in stored:
                case.close(f"img{b}.block{i}.tokens", t.x[b, :n], stored["tokens"], tol)
            if "size" in stored:
                case.close(f"img{b}.block{i}.size", t.size[b, :n], stored["size"], (1e-4, 0))
            if "source" in stored:
                ours = source_matrix(t)[b, :n]
                case.equal(f"img{b}.block{i}.source", ours, stored["source"])
        n, last = int(counts[b, -1]), info.final
        if f"img{b}.final_size" in fx.tensors:
            size = fx.tensors[f"img{b}.final_size"]
            case.close(f"img{b}.final_size", last.size[b, :n], size, (1e-4, 0))
        normed = model.backbone.norm(last.x)
        if f"img{b}.final_cls" in fx.tensors:
            stored = fx.tensors[f"img{b}.final_cls"]
            # Some references store it before the final norm, some behind it.
            near = min((last.x[b, 0], normed[b, 0]), key=lambda y: (y - stored).abs().max().item())
            case.close(f"img{b}.cls", near, stored, tol)
        if f"img{b}.restored" in fx.tensors:
            held = normed[b, last.prefix :][last.source[b]]
            case.close(f"img{b}.restored", held, fx.tensors[f"img{b}.restored"], tol)
        if f"img{b}.slot" in fx.tensors:
            case.equal(f"img{b}.slot", last.source[b], fx.tensors[f"img{b}.slot"])
        if f"img{b}.size" in fx.tensors:
            stored = fx.tensors[f"img{b}.size"]
            ours = last.size[b, :n] if len(stored) == n else last.size[b, last.prefix : n]
            case.close(f"img{b}.size", ours, stored, (1e-4, 0))
    for key in ("counts", "counts.mlp_in"):
        if key in fx.tensors:
            case.equal(key, counts, fx.tensors[key])


def run(fx: Fixture, model: ReducedViT) -> tuple[Case, Info]:
    """An evaluation case of a batch, which must equal its images alone."""
    case = Case(fx.name, "eval")
    with torch.no_grad():
        dense = model.backbone(fx.images)
        logits, info = model(fx.images, return_info="trace")
    case.close("dense_logits", dense, fx.tensors["dense_logits"], fx.tolerance("dense_logits"))
    case.logits("logits", logits, fx.tensors["logits"], fx.tolerance("logits"))
    check_alone(case, model, fx.images, fx.tensors["logits"])
    check_images(case, fx, model, info)
    return case, info


def nothing(fx: Fixture) -> dict[str, object]:
    """A schedule that asks for nothing."""
    return {"name": "per_block", "keep": [None] * fx.info["timm"]["kwargs"]["depth"]}


@handles("dtome")
def dtome(fx: Fixture) -> Iterator[Case]:
    config, depth = fx.config, fx.info["timm"]["kwargs"]["depth"]
    r = config["r_per_block"]
    ratio = config.get("max_r_per_instance_ratio")
    images = fx.tensors["calibration"].float()
    for name, eps in (("thresholds", 1e-4), ("thresholds_clean", 0.0)):
        case = Case(fx.name, name)
        reducer = {
            "name": "dtome",
            "compat_eps": eps,
            "prop_attn": config["prop_attn"],
            "max_r_per_instance_ratio": ratio,
        }
        model = zoo.wrap(fx.backbone(), reducer, nothing(fx)).eval()
        batches = images.split(config["batch"])
        if eps:
            with torch.no_grad(), model.reducer.looking(r):
                for i, batch in enumerate(batches):
                    _, info = model(batch, return_info="trace")
                    stored = fx.tensors["calibration_counts"][i]
                    case.equal(f"counts{i}", rows_left(info).t(), stored)
        found = calibrate(model, batches, r)
        stored = fx.tensors[name]
        # Blocks that never merge keep the threshold one.
        used = torch.tensor([v > 0 for v in r])
        case.logits(name, torch.tensor(found)[used], stored[used], (2e-5, 0))
        yield case
    if "r_total" in config and config.get("r_schedule") in ("constant", "linear", "reverse_linear"):
        case = Case(fx.name, "pairs")
        case.equal("r", pairs_per_block(config["r_total"], depth, config["r_schedule"]), r)
        yield case
    model.reducer.set_thresholds(fx.tensors["thresholds"], r)
    yield run(fx, model)[0]


@handles("dymu")
def dymu(fx: Fixture) -> Iterator[Case]:
    config, stored = fx.config, fx.group("in.")
    case = Case(fx.name, "function")
    prefix = int(config["class_token"])
    x, pos = stored["x"].float(), stored["pos"].float()
    t = Tokens.start(x, prefix, track=True)._replace(size=stored["size"].float())
    if "pad" in stored:
        t = t._replace(mask=~stored["pad"].bool())
    single = config["single"]
    eps = 1e-4 if "1e-4" in config["divisor"] else 0.0
    p = partners(t, stored["metric"].float()[:, prefix:])
    if config["threshold"] is None:
        merged, threshold = best_of_batch(p, config["r"])
        case.close("threshold", threshold.reshape(1), fx.tensors["out.threshold"], (1e-6, 0))
    else:
        merged = above(p, torch.tensor(config["threshold"]), None)
    a = joined(t, p, merged, None, untouched=single, by_similarity=single and not prefix, eps=eps)
    out = apply(t, a)
    member = torch.zeros(x.shape[0], out.n + 1, t.n).scatter(
        1, torch.where(a.slot < 0, out.n, a.slot).unsqueeze(1), 1.0
    )[:, : out.n]
    if t.mask is not None:
        member = member * t.mask[:, None, prefix:]
    ours = torch.cat([pos[:, :prefix], member @ pos[:, prefix:]], 1)
    for b in range(x.shape[0]):
        live = torch.ones(out.x.shape[1], dtype=torch.bool)
        live = live if out.mask is None else out.mask[b]
        keep = live.nonzero().flatten()
        if not single:
            first = ours[b, keep].argmax(1)
            keep = keep[first.argsort()]
        n = len(keep)
        pad = fx.tensors["out.pad"][b].bool()
        case.equal(f"{b}.count", n, int((~pad).sum()))
        case.equal(f"{b}.pos", ours[b, keep] > 0, fx.tensors["out.pos"][b, :n] > 0)
        case.close(f"{b}.size", out.size[b, keep], fx.tensors["out.size"][b, :n], (1e-4, 0))
        theirs = fx.tensors["out.x"][b, :n]
        if not eps:
            case.logits(f"{b}.x", out.x[b, keep], theirs, (1e-5, 1e-5))
            continue
        # The official divisor shrinks the class token, too, which here is out of reach.
        own = out.x[b, keep].clone()
        size = out.size[b, :prefix, None]
        own[:prefix] = own[:prefix] * (size / (size + eps))
        case.logits(f"{b}.x", own, theirs, (1e-5, 1e-5))
    yield case


@handles("algm")
def algm(fx: Fixture) -> Iterator[Case]:
    config = fx.config
    yield by_threshold(fx, layers=config["layers_1based"], window=config["window"])


@handles("g2tm")
def g2tm(fx: Fixture) -> Iterator[Case]:
    config = fx.config
    yield by_threshold(fx, layer=config["layer_1based"], attention=config["attention"])


def by_threshold(fx: Fixture, **args: Any) -> Case:
    """The case of a method that similarities alone decide, with its own arguments."""
    reducer = {"name": fx.method, "threshold": fx.config["threshold"], **args}
    return run(fx, zoo.wrap(fx.backbone(), reducer, nothing(fx)).eval())[0]
