"""CLCA around every reducer of the official repository: one file holds many variants."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

import reduction
from reduction.assignment import Fuse, Keep, Merge
from tests.parity.clca_build import build
from tests.parity.fixture import Case, Fixture, Unsupported
from tests.parity.runner import handles
from zoo.model.reduced import ReducedViT
from zoo.model.stream import Info


@handles("clca")
def clca(fx: Fixture) -> Iterator[Case]:
    for name, variant in fx.info["variants"].items():
        case = Case(fx.name, name)
        _run(case, evaluate, fx, variant, fx.group(f"out.{name}."))
        yield case
    check = fx.info.get("train_check")
    if check:
        case = Case(fx.name, f"{check['variant']}.train")
        _run(case, train, fx, check, fx.group(f"out.{check['variant']}.train."))
        yield case


def _run(case: Case, function: Any, fx: Fixture, spec: dict[str, Any], stored: Any) -> None:
    """One broken variant must not hide the others."""
    try:
        function(case, fx, spec, stored)
    except Unsupported as reason:
        case.unsupported = str(reason)
    except Exception as error:
        case.failures.append(f"{type(error).__name__}: {error}")


def evaluate(case: Case, fx: Fixture, variant: dict[str, Any], stored: dict[str, Tensor]) -> None:
    """Logits, counts, cache, class tokens and choices of one variant."""
    model = build(fx, variant)
    choices = record(model)
    with torch.no_grad():
        logits, info = model(fx.images, return_info="trace")
    case.logits("logits", logits, stored["logits"], fx.tolerance("logits"))
    cls = torch.stack([t.x[:, 0] for t in info.trace])
    tol = fx.tolerance("cls")
    case.close("cls_per_layer", cls, stored["cls_per_layer"], tol)
    case.close("final_cls", cls[-1], stored["final_cls"], tol)
    if "cla_input" in stored:
        rows = cls[variant["cla_input_layers"]].permute(1, 2, 0)
        case.close("cla_input", rows, stored["cla_input"], tol)
    added = [sum(p.added(b, model.depth) for p in model.plugins) for b in range(model.depth)]
    check_counts(case, model, info, variant, added)
    if "cache" in stored:
        check_cache(case, fx, info, variant, stored["cache"], added)
    check_choices(case, info, choices, stored, added)


def _behind_class(info: Info, added: list[int]) -> list[int]:
    """Tokens after each block, before a recovery, without the class token."""
    return [after - extra - 1 for (_, after), extra in zip(info.tokens, added, strict=True)]


def check_counts(
    case: Case, model: ReducedViT, info: Info, variant: dict[str, Any], added: list[int]
) -> None:
    # The official code counts behind a reduction at a block's entry and before a recovery.
    pre = model.reducer is not None and model.reducer.site == "pre"
    pairs = zip(model.plan(), info.tokens, strict=True)
    entering = [plan.attention if pre else n for plan, (n, _) in pairs]
    case.equal("tokens_block_in", entering, variant["tokens_block_in"])
    leaving = [after - extra for (_, after), extra in zip(info.tokens, added, strict=True)]
    case.equal("tokens_block_out", leaving, variant["tokens_block_out"])
    case.equal("final_tokens", info.tokens[-1][1], variant["final_tokens"])
    recovered = {int(k): v for k, v in variant.get("recovered_tokens", {}).items()}
    case.equal("recovered_tokens", {b: n for b, n in enumerate(added) if n}, recovered)
    case.equal("recovery_layers", sorted(recovered), variant.get("recovery_layers", []))


def check_cache(
    case: Case, fx: Fixture, info: Info, variant: dict[str, Any], theirs: Tensor, added: list[int]
) -> None:
    """What was cached is what comes back at the end of the sequence, oldest layer first."""
    rows = [t.x[:, t.x.shape[1] - n :] for t, n in zip(info.trace, added, strict=True) if n]
    case.equal("cached_layers", len(variant["cached_layers"]), len(theirs))
    theirs = theirs.permute(1, 0, 2, 3).flatten(1, 2)
    case.close("cache", torch.cat(rows, dim=1), theirs, fx.tolerance("cache"))


# ------------------------------------------------------------------ choices

Choices = dict[int, Tensor]


def record(model: ReducedViT) -> Choices:
    """Have the reducer note the tokens that it keeps, by block; -1 is a fused one, or padding."""
    chosen: Choices = {}
    reducer: Any = model.reducer
    if reducer is None:
        return chosen
    assign, attend = reducer.assign, getattr(reducer, "attend", None)

    def on_assign(t: Any, s: Any, step: Any) -> Any:
        answer = assign(t, s, step)
        if isinstance(answer, Keep):
            chosen[step.block] = answer.index
        elif isinstance(answer, Merge | Fuse):
            fused = torch.arange(answer.leader.shape[1]) >= step.keep
            chosen[step.block] = answer.leader.masked_fill(fused, -1)
        return answer

    def on_attend(a: Any, t: Any, step: Any) -> Any:
        answer = attend(a, t, step)
        if answer is not None and answer.tokens is not None:
            after = answer.tokens
            same = (after.patches.unsqueeze(2) == t.patches.unsqueeze(1)).all(-1)
            place = same.float().argmax(-1)
            padding = torch.zeros_like(place, dtype=torch.bool)
            padding = padding if after.mask is None else ~after.mask[:, t.prefix :]
            chosen[step.block] = place.masked_fill(padding, -1)
        return answer

    reducer.assign = on_assign
    if isinstance(reducer, reduction.OwnAttention):
        reducer.attend = on_attend
    return chosen


def check_choices(
    case: Case, info: Info, ours: Choices, stored: dict[str, Tensor], added: list[int]
) -> None:
    """Sizes as they are; kept tokens as sets, followed through the stages.

    The order of kept tokens is not part of the method (except ToMe's), so positions in a later
    block say nothing by themselves: both sides are traced back to the first block.
    """
    theirs: Choices = {}
    for key, value in stored.items():
        kind, _, block = key.partition(".L")
        if kind == "size":
            size = info.trace[int(block)].size
            size = size[:, : size.shape[1] - added[int(block)]]
            case.close(key, size, value, (1e-5, 0.0))
        elif kind == "kept_idx":
            theirs[int(block)] = value
        elif kind == "sample_ids":  # counted from the class token, which also stands for padding
            theirs[int(block)] = value - 1
    if theirs:
        lengths = [info.tokens[0][0] - 1, *_behind_class(info, added)]
        for image in range(len(info.final.x)):
            a, b = (_followed(c, image, lengths, added) for c in (ours, theirs))
            for block in sorted(theirs):
                case.equal(f"kept.L{block}[{image}]", a.get(block), b[block])


def _followed(
    choices: Choices, image: int, lengths: list[int], added: list[int]
) -> dict[int, list[str]]:
    """Names of the tokens that survive each block, sorted."""
    names = [str(i) for i in range(lengths[0])]
    found = {}
    for block, extra in enumerate(added):
        if block in choices:
            rows = choices[block][image].tolist()
            names = [names[i] for i in rows if i >= 0]
            found[block] = sorted(names)
            # What stands for no single token is a fused one, or padding at the end.
            names += [f"other {block}"] * (lengths[block + 1] - len(names))
        names = names + [f"recovered {block}.{i}" for i in range(extra)]
    return found


# ------------------------------------------------------------------ training


def train(case: Case, fx: Fixture, check: dict[str, Any], stored: dict[str, Tensor]) -> None:
    """One training step: logits, loss, batch norm's statistics, gradients."""
    tol = fx.tolerance("train")
    model = build(fx, fx.info["variants"][check["variant"]]).train()
    logits = model(fx.images)
    loss = nn.functional.cross_entropy(logits, torch.tensor(check["targets"]))
    loss.backward()
    case.logits("logits", logits, stored.pop("logits"), tol)
    case.close("loss", loss.reshape(1), stored.pop("loss"), tol)
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    buffers = dict(model.named_buffers())
    for key, value in stored.items():
        pool = gradients if key.startswith("grad.") else buffers
        case.close(key, pool[_full_name(key.removeprefix("grad."), list(pool))], value, tol)


def _full_name(short: str, names: list[str]) -> str:
    """The shortest name that holds all words of a short one in order, e.g. of block0_qkv_bias."""
    words = re.sub(r"block(\d+)", r"blocks_\1", short).split("_")
    hits = []
    for name in names:
        rest = iter(re.split(r"[._]", name))
        if all(word in rest for word in words):
            hits.append(name)
    return min(hits, key=len)
