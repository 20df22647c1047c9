"""ATC: stage-wise and in every block."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from reduction.schedules.constant_r import parse_r
from tests.parity.fixture import Case, Fixture, gradient_check, labels
from tests.parity.runner import handles
from tests.parity.stages import build, check_blocks, check_counts, evaluated


def counts(fx: Fixture) -> list[int | None]:
    """Clusters left by each block, in the reference's arithmetic."""
    config, kwargs = fx.config, fx.info["timm"]["kwargs"]
    depth, n0 = kwargs["depth"], (kwargs["img_size"] // kwargs["patch_size"]) ** 2
    out: list[int | None] = [None] * depth
    if "keep_rate" in config:
        rates = config["keep_rate"]
        for stage, block in enumerate(config["reduction_loc"]):
            rate = rates[0] ** (stage + 1) if len(rates) == 1 else rates[stage]
            # No cluster at all means no reduction there.
            out[block] = int(n0 * rate) or None
        return out
    n, r, inflection = n0, config["r"], None
    if config.get("r_type") == "tuple":
        r, inflection = r
    for block, drop in enumerate(parse_r(depth, r, inflection)[:depth]):
        # The reference counts the class token among the tokens but not among the clusters.
        n -= max(min(drop, n) - 1, 0)
        out[block] = n
    return out


def renamed(source: Tensor) -> Tensor:
    """Groups numbered in the order of their first patches."""
    out = labels(source)
    for row in out:
        ids: dict[int, int] = {}
        for i, value in enumerate(row.tolist()):
            row[i] = ids.setdefault(value, len(ids))
    return out


@handles("atc", "atc_per_block")
def atc(fx: Fixture) -> Iterator[Case]:
    config = fx.config
    prop = config.get("prop_attn", True)
    plain = fx.method == "atc" and not prop
    reducer = {
        "name": "atc",
        "linkage": config["linkage"],
        "prop_attn": prop,
        "mean": "plain" if plain else "size",
    }
    model = build(fx, reducer, {"name": "per_block", "keep": counts(fx), "strict": False})
    case, info = evaluated(fx, model)
    check_counts(case, fx, model, info)
    check_blocks(case, fx, model, info)
    stages = {f"stage{s}.": b for s, b in enumerate(fx.info.get("stage_blocks", []))}
    stages |= {f"block{b}.": b for b in range(len(info.trace))}
    for prefix, block in stages.items():
        stored, t = fx.group(prefix), info.trace[block]
        if "partition" in stored:
            case.equal(f"{prefix}partition", renamed(t.source), stored["partition"])
        if "n_clusters" in stored:
            case.equal(f"{prefix}n_clusters", [t.n] * len(t.x), stored["n_clusters"].tolist())
        if "tokens_sorted" in stored:
            tol = fx.tolerance("features")
            ours = t.patches
            case.close(f"{prefix}tokens", ours, stored["tokens_sorted"], tol)
    yield case
    if fx.group("grad."):
        case = Case(fx.name, "grad")
        logits = model(fx.images)
        case.logits("logits", logits, fx.tensors["logits"], fx.tolerance("logits"))
        gradient_check(case, fx, logits, model.backbone.named_parameters())
        yield case
