"""DiffRate's published schedules: multiply-accumulates to the integer, in its own convention."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from timm.models.vision_transformer import VisionTransformer

import zoo
from reduction.functional.diffrate_cost import caformer_s36_macs, effective_counts, vit_macs
from tests.parity.fixture import Case, Fixture
from tests.parity.runner import handles


@handles("diffrate_compression_rates")
def published(fx: Fixture) -> Iterator[Case]:
    for model, entry in fx.info.items():
        if model.startswith("_"):
            continue
        arch = entry.get("arch")
        for target, spec in entry["schedules"].items():
            case = Case(fx.name, f"{model}@{target}")
            if arch is None:
                case.equal("macs", caformer_s36_macs(spec["merge_kept"]), spec["macs_exact"])
                case.equal("dense", caformer_s36_macs(), entry["dense_macs_exact"])
                yield case
                continue
            start, width = arch["tokens_with_class"], arch["embed_dim"]
            lists = spec["prune_kept"], spec["merge_kept"]
            counts = effective_counts(start, *lists)
            case.equal("tokens", counts, spec["tokens_after_block"])
            formula = vit_macs(counts, start, width, arch["patch_size"], arch["num_classes"])
            case.equal("formula", formula, spec["macs_exact"])
            with torch.device("meta"):
                backbone = VisionTransformer(
                    patch_size=arch["patch_size"],
                    embed_dim=width,
                    depth=arch["depth"],
                    num_heads=arch["heads"],
                    weight_init="skip",
                )
            schedule = {"name": "per_block", "keep": lists[1], "prune": lists[0], "prefix": 1}
            # The convention leaves matching out, so any method with these counts costs the same.
            counted = zoo.profile(zoo.wrap(backbone, "topk", schedule), convention="diffrate")
            case.equal("profile", counted.macs, spec["macs_exact"])
            case.equal("dense", round(counted.dense * 1e9), entry["dense_macs_exact"])
            yield case
