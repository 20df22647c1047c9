"""PixelPrune in a model, and the functions of RLT and EVS."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import zoo
from reduction.functional.frames import dissimilarity, evs_count, static_runs, tubes
from reduction.functional.portable import stable_order
from reduction.functional.predicting import patch_vectors, predicted_2d, runs
from tests.parity.fixture import Case, Fixture
from tests.parity.learned import check_alone
from tests.parity.runner import handles


@handles("pixelprune")
def pixelprune(fx: Fixture) -> Iterator[Case]:
    config = fx.config
    pixels = fx.tensors["image_u8"].float() / 255
    vectors = patch_vectors(pixels, tuple(config["grid"]))
    for k, v in enumerate(config["variants"]):
        case = Case(fx.name, f"v{k}")
        metric = "max" if v["metric"] == "exact" else v["metric"]
        if v["scan"] == "pred_2d":
            anchored = v["anchored"] and v["metric"] != "exact"
            found = predicted_2d(vectors, metric, v["threshold"], anchored)
        else:
            found = runs(vectors, metric, v["threshold"], v["scan"] == "serpentine")
        for b in range(len(pixels)):
            stored = fx.group(f"v{k}.img{b}.")
            case.equal(f"img{b}.keep", found.kept[b].nonzero().flatten(), stored["keep"])
            case.equal(f"img{b}.source", found.source[b], stored["source"])
        yield case
    v = config["variants"][config["vit_variant"]]
    reducer = {
        "name": "pixelprune",
        **{k: v[k] for k in ("scan", "metric", "threshold", "anchored")},
    }
    depth = fx.info["timm"]["kwargs"]["depth"]
    model = zoo.wrap(fx.backbone(), reducer, {"name": "per_block", "keep": [None] * depth}).eval()
    images, case = (pixels - 0.5) / 0.5, Case(fx.name, "vit")
    with torch.no_grad():
        dense = model.backbone(images)
        logits, info = model(images, return_info=True)
    case.close("dense_logits", dense, fx.tensors["dense_logits"], fx.tolerance("dense_logits"))
    case.logits("logits", logits, fx.tensors["logits"], fx.tolerance("logits"))
    for b in range(len(images)):
        stored = fx.tensors[f"img{b}.final_tokens"]
        x = info.final.x[b, : len(stored)]
        near = min((x, model.backbone.norm(x)), key=lambda y: (y - stored).abs().max().item())
        case.close(f"img{b}.final_tokens", near, stored, fx.tolerance("features"))
    check_alone(case, model, images, fx.tensors["logits"])
    yield case


@handles("rlt and evs", "rlt", "evs")
def stacks(fx: Fixture) -> Iterator[Case]:
    rlt = fx.config.get("rlt")
    for k, spec in enumerate(rlt["cases"] if rlt else ()):
        case, stored = Case(fx.name, f"rlt{k}"), fx.group(f"rlt{k}.")
        clip = fx.tensors["clip"].float()
        found = static_runs(*tubes(clip, rlt["patch"], rlt["tubelet"]), spec["threshold"])
        case.equal("keep", found.kept, stored["keep"] > 0)
        case.equal("length", found.length, stored["length"])
        case.equal("source", found.source, stored["source"])
        case.equal("kept", found.kept.sum(1).tolist(), spec["kept"])
        if "official_lengths" in stored:
            # Row, column, time: the order in which the official code lists them.
            places = found.length.shape[1] // (clip.shape[2] // rlt["tubelet"])
            turned = found.length.view(len(clip), -1, places).transpose(1, 2).flatten()
            case.equal("official_lengths", turned[turned > 0], stored["official_lengths"])
        yield case
    evs = fx.config.get("evs")
    for k, spec in enumerate(evs["cases"] if evs else ()):
        case = Case(fx.name, f"evs{k}")
        frames, rows, columns = evs["thw"]
        score = dissimilarity(fx.tensors["embeddings"].float()).flatten()
        keep = evs_count(rows * columns, frames, spec["q"])
        case.equal("kept", keep, spec["kept"])
        chosen = stable_order(score, dim=0, descending=True)[:keep]
        mask = torch.zeros(len(score), dtype=torch.bool).scatter(0, chosen, True)
        case.equal("keep", mask, fx.tensors[f"evs{k}.keep"] > 0)
        yield case
    if "evs_count_table" in fx.info:
        case = Case(fx.name, "evs counts")
        for places, frames, q, kept in fx.info["evs_count_table"]:
            case.equal(f"{places} {frames} {q}", evs_count(places, frames, q), kept)
        yield case
