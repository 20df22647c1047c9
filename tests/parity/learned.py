"""What the handlers of methods with learned parts have in common."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import reduction
import zoo
from tests.parity.fixture import Case, Fixture, gradient_check
from tests.parity.stages import check_blocks, check_counts, evaluated
from zoo.model.reduced import ReducedViT
from zoo.model.stream import Info

Names = dict[str, str]


def counts_or_rate(fx: Fixture) -> dict[str, Any]:
    """One rate compounds; a longer list holds absolute counts in that code base."""
    rate, blocks = fx.config["keep_rate"], fx.config["reduction_loc"]
    if len(rate) == 1:
        return {"name": "keep_rate", "rate": rate[0], "blocks": blocks}
    keep: list[int | None] = [None] * fx.info["timm"]["kwargs"]["depth"]
    for block, count in zip(blocks, rate, strict=True):
        keep[block] = int(count)
    return {"name": "per_block", "keep": keep}


def rate_or_shares(fx: Fixture) -> dict[str, Any]:
    """One rate compounds; a longer list holds shares of the initial count."""
    rate = fx.config["keep_rate"]
    return {
        "name": "keep_rate",
        "rate": rate[0] if len(rate) == 1 else rate,
        "blocks": fx.config["reduction_loc"],
    }


def load_parts(model: ReducedViT, fx: Fixture, names: Names) -> None:
    """Load a reducer's parameters by their reference names."""
    state = {}
    for name, value in fx.group("reducer.").items():
        for theirs, ours in names.items():
            name = name.replace(theirs, ours, 1)
        state[name] = value.float()
    model.reducer.load_state_dict(state)


def named(model: ReducedViT, names: Names) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Parameters under their reference names."""
    yield from model.backbone.named_parameters()
    for name, parameter in model.reducer.named_parameters():
        for theirs, ours in names.items():
            name = name.replace(ours, theirs, 1)
        yield name, parameter


def cases(
    fx: Fixture, reducer: dict[str, Any], names: Names, schedule: Any
) -> Iterator[tuple[Case, ReducedViT, Info | None]]:
    """Evaluation and gradient cases; the caller adds its own checks to the first."""
    model = zoo.wrap(fx.backbone(), reducer, schedule).eval()
    load_parts(model, fx, names)
    case, info = evaluated(fx, model)
    if not isinstance(model.reducer, reduction.Adaptive):
        check_counts(case, fx, model, info)
    check_blocks(case, fx, model, info)
    yield case, model, info
    if fx.group("grad."):
        case = Case(fx.name, "grad")
        logits = model(fx.images)
        case.logits("logits", logits, fx.tensors["logits"], fx.tolerance("logits"))
        gradient_check(case, fx, logits, named(model, names))
        yield case, model, None


def compare_gradients(case: Case, fx: Fixture, model: ReducedViT, names: Names) -> None:
    """Compare stored gradients and norms after a backward pass."""
    tol, parameters = fx.tolerance("grad"), dict(named(model, names))
    for name, value in fx.group("grad.").items():
        case.close(f"grad {name}", parameters[name].grad, value, tol)
    for name, norm in fx.info["gradients"]["param_grad_norms"].items():
        grad = parameters[name].grad
        if norm is None:
            case.equal(f"grad norm {name}", grad is None or float(grad.norm()) == 0.0, True)
        else:
            case.close(f"grad norm {name}", grad.norm(), torch.tensor(norm), tol)


def check_ragged(case: Case, fx: Fixture, info: Info) -> None:
    """Kept sets where images keep different numbers of tokens (-1 is padding)."""
    for stage, block in enumerate(fx.info["stage_blocks"]):
        t, stored = info.trace[block], fx.group(f"stage{stage}.")
        case.equal(f"stage{stage}.n_valid", t.mask[:, t.prefix :].sum(1), stored["n_valid"])
        for b in range(t.x.shape[0]):
            ours = [p for p, slot in enumerate(t.source[b].tolist()) if slot >= 0]
            theirs = sorted(i for i in stored["kept_abs"][b].tolist() if i >= 0)
            case.equal(f"stage{stage}.kept[{b}]", ours, theirs)


def check_alone(case: Case, model: ReducedViT, images: Tensor, logits: Tensor) -> None:
    """One image at a time, without padding, must give the same."""
    with torch.no_grad():
        single = torch.cat([model(images[i : i + 1]) for i in range(images.shape[0])])
    case.close("alone", single, logits, (1e-4, 1e-4))
