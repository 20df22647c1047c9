"""vid-TLDR in a model; the functions of ToMA and Expedit."""

from __future__ import annotations

from collections.abc import Iterator

from reduction.functional.facilities import as_means, facilities, shares
from reduction.functional.restoring import knn_weights
from reduction.functional.scores import saliency
from reduction.functional.superpixels import clusters, squared_distances
from tests.parity.fixture import Case, Fixture
from tests.parity.runner import handles
from tests.parity.stages import build, check_blocks, check_counts, evaluated


@handles("vidtldr")
def vidtldr(fx: Fixture) -> Iterator[Case]:
    config, depth = fx.config, fx.info["timm"]["kwargs"]["depth"]
    removed = list(config["r"]) + [0] * (depth - len(config["r"]))
    n = fx.backbone().patch_embed.num_patches
    keep: list[int | None] = []
    for r in removed:
        leave = min(int(n * r) if 0 < r < 1 else r, n // 2)
        n -= leave
        keep.append(n if leave else None)
    reducer = {"name": "vidtldr", "prop_attn": config.get("prop_attn", True)}
    model = build(fx, reducer, {"name": "per_block", "keep": keep})
    seen = []
    original = model.reducer.assign

    def noted(t, s, step):  # type: ignore[no-untyped-def]
        seen.append((step.block, saliency(s.need("attn"), t.prefix)))
        return original(t, s, step)

    model.reducer.__dict__["assign"] = noted
    case, info = evaluated(fx, model)
    check_counts(case, fx, model, info)
    check_blocks(case, fx, model, info)
    tol = fx.tolerance("features")
    for i, t in enumerate(info.trace):
        if f"block{i}.tokens" in fx.tensors:
            case.close(f"block{i}.tokens", t.x, fx.tensors[f"block{i}.tokens"], tol)
    for block, weight in seen:
        stored = fx.tensors.get(f"block{block}.saliency")
        if stored is not None:
            case.close(f"block{block}.saliency", weight, stored[:, model.prefix :], (1e-4, 1e-4))
    yield case


@handles("toma")
def toma(fx: Fixture) -> Iterator[Case]:
    for i, spec in enumerate(fx.config["cases"]):
        case, stored = Case(fx.name, f"case{i}"), fx.group(f"c{i}.")
        x = stored["x"].float()
        chosen = facilities(x, spec["keep"])
        share = shares(x, chosen, spec["scale"])
        weights = as_means(share)
        # A thousand times a cosine, whose last digits float32 does not have.
        tol = (2e-3, 2e-3)
        case.equal("selected", chosen, stored["selected"])
        case.close("weights", weights, stored["weights"], tol)
        merged = weights @ x
        case.logits("merged", merged, stored["merged"], tol)
        case.close("restored", share.transpose(1, 2) @ merged, stored["restored"], tol)
        yield case


@handles("expedit")
def expedit(fx: Fixture) -> Iterator[Case]:
    for i, spec in enumerate(fx.config["cases"]):
        case, stored = Case(fx.name, f"case{i}"), fx.group(f"c{i}.")
        x = stored["features"].float().flatten(2).transpose(1, 2)
        grid, coarse = tuple(spec["grid"]), tuple(spec["new_grid"])
        found = clusters(x, grid, coarse, spec["iterations"], spec["temperature"], spec["window"])
        case.logits("centres", found.centres, stored["centres"], (1e-4, 1e-4))
        nearest = squared_distances(x, found.centres).argmin(1)
        case.equal("labels", nearest, stored["labels"])
        for name, l2 in (("restored", True), ("restored_mean", False)):
            back = knn_weights(x, found.centres, spec["k"], spec["restore_temperature"], l2=l2)
            tokens = stored["tokens"].float()
            case.close(name, back @ tokens, stored[name], (1e-4, 1e-4))
        yield case
