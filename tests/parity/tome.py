"""ToMe: official, stage-wise, and its functions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from reduction.assignment import Merge, apply, unmerge
from reduction.functional.matching import Matching, bipartite_matching, kth_matching
from reduction.schedules.constant_r import parse_r
from reduction.tokens import Tokens
from tests.parity.fixture import Case, Fixture
from tests.parity.runner import handles
from tests.parity.stages import run_cases, source_matrix


@handles("tome")
def tome(fx: Fixture) -> Iterator[Case]:
    config = fx.config
    if "keep_rate" in config:
        rate = config["keep_rate"]
        schedule: dict[str, Any] = {"name": "keep_rate", "strict": False}
        if len(rate) == 1:
            blocks = config["reduction_loc"]
            schedule |= {"rate": rate[0], "blocks": blocks, "nominal_r": True}
        else:
            # A longer list means counts in that code base.
            depth = fx.info["timm"]["kwargs"]["depth"]
            removed, before = [0] * depth, fx.backbone().patch_embed.num_patches
            for block, count in zip(config["reduction_loc"], rate, strict=True):
                removed[block], before = max(0, before - int(count)), int(count)
            schedule = {"name": "constant_r", "r": removed, "strict": False}
        yield from run_cases(fx, "tome", schedule)
        return
    r, inflection = config["r"], None
    if config.get("r_type") == "tuple":
        r, inflection = r
    reducer = {"name": "tome", "prop_attn": config.get("prop_attn", True)}
    schedule = {"name": "constant_r", "r": r, "inflection": inflection, "strict": False}
    yield from run_cases(fx, reducer, schedule)


def _merge(x: torch.Tensor, size: torch.Tensor, match: Matching) -> Tokens:
    t = Tokens.start(x, 0, track=True)._replace(size=size)
    return apply(t, Merge(None, match.leader, pairs=(match.source, match.target)))


@handles("tome.merge functions")
def functions(fx: Fixture) -> Iterator[Case]:
    for i, spec in enumerate(fx.info.get("cases", [])):
        case = Case(fx.name, f"case{i}")
        stored = fx.group(f"case{i}.")
        prefix = int(spec["class_token"]) + int(spec["distill_token"])
        match = bipartite_matching(stored["metric"][:, prefix:], spec["r"], prefix)
        pairs = (match.source, match.target)
        for suffix, size in (
            ("", stored["size_in"][..., 0]),
            ("_nosize", torch.ones_like(stored["size_in"][..., 0])),
        ):
            t = Tokens.start(stored["x"], prefix, track=True)._replace(size=size)
            t = apply(t, Merge(None, match.leader, pairs=pairs))
            case.close(f"size_out{suffix}", t.size, stored[f"size_out{suffix}"][..., 0], (1e-6, 0))
            case.logits(f"x_out{suffix}", t.x, stored[f"x_out{suffix}"], (1e-5, 0))
            if not suffix:
                case.equal("source", source_matrix(t), stored["source"])
                if "unmerged" in stored:
                    back = torch.cat([t.x[:, :prefix], unmerge(t)], dim=1)
                    case.close("unmerged", back, stored["unmerged"], (1e-5, 0))
        yield case
    for i, spec in enumerate(fx.info.get("kth_cases", [])):
        case = Case(fx.name, f"kth{i}")
        stored = fx.group(f"kth{i}.")
        x = stored["x"]
        t = _merge(x, torch.ones(x.shape[:2]), kth_matching(stored["metric"], spec["k"]))
        case.equal("T_out", t.n, spec["T_out"])
        case.close("size_out", t.size, stored["size_out"][..., 0], (1e-6, 0))
        case.logits("x_out", t.x, stored["x_out"], (1e-5, 0))
        full = stored["unmerged"].shape[1]
        case.close("unmerged", unmerge(t)[:, :full], stored["unmerged"], (1e-5, 0))
        yield case
    for i, spec in enumerate(fx.info.get("parse_r_cases", [])):
        case = Case(fx.name, f"parse_r{i}")
        r, inflection = spec["r"], None
        if spec["type"] == "tuple":
            r, inflection = r
        case.equal("r", parse_r(spec["layers"], r, inflection), spec["out"])
        yield case
