"""Representation shift: scores and kept sets; own second implementation, no official code."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import zoo
from tests.parity.fixture import Case, Fixture
from tests.parity.runner import handles
from tests.parity.stages import evaluated
from zoo.model.reduced import ReducedViT


def _model(fx: Fixture, **options: bool) -> ReducedViT:
    config = fx.config
    schedule = {
        "name": "keep_rate",
        "rate": config["keep_rate"],
        "of": "current",
        "blocks": config["cut_after_blocks"],
    }
    return zoo.wrap(fx.backbone(), {"name": "repshift", **options}, schedule).eval()


@handles("repshift")
def repshift(fx: Fixture) -> Iterator[Case]:
    model = _model(fx)
    seen: list[torch.Tensor] = []
    original = model.reducer.score

    def noted(*args: object) -> torch.Tensor:
        seen.append(original(*args))
        return seen[-1]

    model.reducer.__dict__["score"] = noted
    case, info = evaluated(fx, model)
    tol = fx.tolerance("features")
    for block, score in zip(fx.config["cut_after_blocks"], seen, strict=False):
        stored = fx.group(f"block{block}.")
        case.close(f"block{block}.score", score, stored["score"], tol)
        source = info.trace[block].source
        kept = [(row >= 0).nonzero().flatten() for row in source]
        case.equal(f"block{block}.kept", torch.stack(kept), stored["kept"])
    final = fx.tensors["final_tokens"]
    if final.shape == info.final.x.shape:
        near = min(
            (info.final.x, model.backbone.norm(info.final.x)),
            key=lambda y: (y - final).abs().max().item(),
        )
        case.close("final_tokens", near, final, tol)
    if "logits_residual_reading" in fx.tensors:
        with torch.no_grad():
            other = _model(fx, residual=True)(fx.images)
        case.logits("residual", other, fx.tensors["logits_residual_reading"], (1e-4, 1e-4))
    yield case
