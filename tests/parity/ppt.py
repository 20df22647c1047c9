"""PPT: the official code, with its decisions per image."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from reduction.counts import Step
from reduction.methods.ppt import PPT
from reduction.tokens import Signals, Tokens
from tests.parity.fixture import Case, Fixture, gradient_check
from tests.parity.runner import handles
from tests.parity.stages import check_blocks, check_counts, evaluated
from zoo.build import wrap


class Watched(PPT):
    """Writes down the variances that decide."""

    def assign(self, t: Tokens, s: Signals, step: Step) -> Any:
        self.variances.append(self.score(t, s, step).var(1).detach())
        return super().assign(t, s, step)


def schedule_of(fx: Fixture) -> dict[str, Any]:
    """One number for the listed blocks, or a list that they use up in order."""
    depth, blocks = fx.info["timm"]["kwargs"]["depth"], sorted(fx.config["pp_loc_list"])
    r = fx.config["r"]
    given = list(r) if isinstance(r, list | tuple) else [r] * len(blocks)
    drops = [0] * depth
    for block, count in zip(blocks, given, strict=False):
        drops[block] = int(count)
    return {"name": "constant_r", "r": drops, "strict": False}


@handles("ppt")
def ppt(fx: Fixture) -> Iterator[Case]:
    prop = bool(fx.config.get("prop_attn", True))
    reducer = Watched(threshold=float(fx.config["threshold"]), patches=None, prop_attn=prop)
    reducer.variances = []
    model = wrap(fx.backbone(), reducer, schedule_of(fx)).eval()
    case, info = evaluated(fx, model)
    check_counts(case, fx, model, info)
    if not prop:
        info = info._replace(trace=forgetful(info.trace))
    check_blocks(case, fx, model, info)
    variances = torch.stack(reducer.variances, dim=1)
    if "stage.score_variance" in fx.tensors:
        stored = fx.tensors["stage.score_variance"]
        case.close("score_variance", variances, stored, (1e-7, 1e-3))
    if "stage.pooled" in fx.tensors:
        stored = fx.tensors["stage.pooled"]
        case.equal("pooled", (variances < reducer.threshold).to(stored.dtype), stored)
    yield case
    if fx.group("grad."):
        case = Case(fx.name, "grad")
        logits = model(fx.images)
        case.logits("logits", logits, fx.tensors["logits"], fx.tolerance("logits"))
        gradient_check(case, fx, logits, model.backbone.named_parameters())
        yield case


def forgetful(trace: tuple[Tokens, ...]) -> tuple[Tokens, ...]:
    """The trace with the sizes of the official code, which start at one again in every stage."""
    out, last, size = [], None, None
    for t in trace:
        if last is None or t.x.shape[1] != last.x.shape[1]:
            size = torch.ones_like(t.size)
            for b in range(t.x.shape[0]):
                for slot in range(t.n):
                    held = t.source[b] == slot
                    old = held.nonzero() if last is None else last.source[b][held].unique()
                    size[b, t.prefix + slot] = len(old)
        last = t
        out.append(t._replace(size=size))
    return tuple(out)
