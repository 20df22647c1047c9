"""Joint pruning and squeezing, in both variants."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

import zoo
from reduction.methods import dynamicvit as dynamic
from reduction.mixins.training import Outcome
from reduction.tokens import Tokens
from tests.parity.fixture import Case, Fixture
from tests.parity.learned import cases, check_alone, compare_gradients, load_parts
from tests.parity.runner import handles
from zoo.model.stream import Info

SCORE = {"score_predictor.": "stages."}


def _rate(value: Any) -> Any:
    """One number compounds; a list holds the share of each stage."""
    if isinstance(value, list):
        return value[0] if len(value) == 1 else value
    return value


def _schedule(fx: Fixture, rate: str, blocks: str, **rule: str) -> dict[str, Any]:
    value, where = _rate(fx.config[rate]), fx.config[blocks]
    return {"name": "keep_rate", "rate": value, "blocks": where, **rule}


def _options(fx: Fixture) -> dict[str, Any]:
    """Arguments that a fixture may name."""
    config = fx.config
    out: dict[str, Any] = {"temperature": float(config.get("temperature", 1.0))}
    if config.get("mse_token_loss", config.get("mse_token", False)):
        out["token_loss"] = "mse"
    return out


def check_hosts(case: Case, fx: Fixture, info: Info) -> None:
    """Kept patches as sets, and the kept patch that holds each input patch."""
    for stage, block in enumerate(fx.info["stage_blocks"]):
        t, stored = info.trace[block], fx.group(f"stage{stage}.")
        assert t.origin is not None and t.source is not None
        kept = stored["kept_abs"].sort(1).values
        case.equal(f"stage{stage}.kept", t.origin.sort(1).values, kept)
        hosts = t.origin.gather(1, t.source)
        case.equal(f"stage{stage}.hosts", hosts, stored["host_of_patch"])


def evaluation(
    fx: Fixture, reducer: dict[str, Any], names: dict[str, str], schedule: dict[str, Any]
) -> Iterator[Case]:
    for case, model, info in cases(fx, reducer, names, schedule):
        if info is not None:
            check_hosts(case, fx, info)
            check_alone(case, model, fx.images, fx.tensors["logits"])
        yield case


@handles("etps")
def etps(fx: Fixture) -> Iterator[Case]:
    schedule = _schedule(fx, "keep_rate", "drop_loc", rounding="ceil", of="current")
    yield from evaluation(fx, {"name": "etps", **_options(fx)}, {}, schedule)


@handles("dtps")
def dtps(fx: Fixture) -> Iterator[Case]:
    reducer = {"name": "dtps", **_options(fx)}
    yield from evaluation(fx, reducer, SCORE, _schedule(fx, "keep_ratio", "prune_loc"))


@handles("dtps (training)")
def dtps_training(fx: Fixture) -> Iterator[Case]:
    rate, stages = _rate(fx.config["keep_ratio"]), range(len(fx.config["prune_loc"]))
    ratios = rate if isinstance(rate, list) else [rate ** (s + 1) for s in stages]
    reducer = {"name": "dtps", "ratios": ratios, **_options(fx)}
    schedule = _schedule(fx, "keep_ratio", "prune_loc")
    model = zoo.wrap(fx.backbone(), reducer, schedule)
    load_parts(model, fx, SCORE)
    model.train()
    noise = iter([fx.tensors[f"stage{s}.gumbel"] for s in stages])
    original = dynamic.gumbel_noise
    dynamic.gumbel_noise = lambda shape, device: next(noise)
    try:
        logits, info = model(fx.images, return_info="trace")
    finally:
        dynamic.gumbel_noise = original
    case = Case(fx.name, "train")
    with torch.no_grad():
        dense = model.backbone(fx.images)
    case.close("dense_logits", dense, fx.tensors["dense_logits"], fx.tolerance("dense_logits"))
    case.logits("logits", logits, fx.tensors["logits"], fx.tolerance("logits"))
    for s in stages:
        kept = (info.final.memory[f"kept.{s}"] > 0.5).float()
        case.equal(f"stage{s}.keep", kept, fx.tensors[f"stage{s}.keep"].float())
    labels = fx.tensors["labels"]
    # The stored teacher knows patches only.
    tokens = Tokens.start(fx.tensors["teacher.tokens"].float(), prefix=0)
    taught = Outcome((), tokens, fx.tensors["teacher.logits"].float(), labels)
    losses = model.reducer.auxiliary_losses(model.outcome(info, logits, labels, taught))
    ce = F.cross_entropy(logits, labels)
    total = ce + sum(losses.values())
    parts = {
        "ce": ce,
        "ratio_loss": losses["ratio"],
        "kl_logits": losses["logits"] / model.reducer.logit_weight,
        "kl_tokens": losses["token"] / model.reducer.token_weight,
        "mse_tokens": losses["token"] / model.reducer.token_weight,
        "loss": total,
    }
    for name, stored in fx.group("train.").items():
        case.close(f"train.{name}", parts[name].reshape(1), stored, (1e-4, 1e-4))
    total.backward()
    compare_gradients(case, fx, model, SCORE)
    yield case
