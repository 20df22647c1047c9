"""What the fixtures of all reducers on a plain ViT have in common."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import zoo
from reduction.tokens import Tokens
from tests.parity.fixture import Case, Fixture, gradient_check, labels
from zoo.model.reduced import ReducedViT
from zoo.model.stream import Info


def build(fx: Fixture, reducer: Any, schedule: Any, **extra: Any) -> ReducedViT:
    """The fixture's model with a reducer attached by the public API."""
    return zoo.wrap(fx.backbone(**extra), reducer, schedule).eval()


def run_cases(fx: Fixture, reducer: Any, schedule: Any, counts: bool = True) -> Iterator[Case]:
    """An evaluation case and, where the fixture stores gradients, a gradient case."""
    model = build(fx, reducer, schedule)
    case, info = evaluated(fx, model)
    if counts:
        check_counts(case, fx, model, info)
    check_blocks(case, fx, model, info)
    check_stages(case, fx, info)
    yield case
    if fx.group("grad."):
        case = Case(fx.name, "grad")
        logits = model(fx.images)
        case.logits("logits", logits, fx.tensors["logits"], fx.tolerance("logits"))
        gradient_check(case, fx, logits, model.backbone.named_parameters())
        yield case


def evaluated(fx: Fixture, model: ReducedViT) -> tuple[Case, Info]:
    """An evaluation case whose logits are compared, and what happened to the tokens."""
    case = Case(fx.name, "eval")
    with torch.no_grad():
        dense = model.backbone(fx.images)
        logits, info = model(fx.images, return_info="trace")
    if "dense_logits" in fx.tensors:
        case.close("dense_logits", dense, fx.tensors["dense_logits"], fx.tolerance("dense_logits"))
    case.logits("logits", logits, fx.tensors["logits"], fx.tolerance("logits"))
    return case, info


def check_counts(case: Case, fx: Fixture, model: ReducedViT, info: Info) -> None:
    """Tokens in every attention and MLP."""
    plan = model.plan()
    case.equal("tokens", list(info.tokens), [(p.entering, p.leaving) for p in plan])
    for key, ours in (("attn_in", [p.attention for p in plan]), ("mlp_in", [p.mlp for p in plan])):
        if f"counts.{key}" in fx.tensors:
            case.equal(f"counts.{key}", ours, fx.tensors[f"counts.{key}"].tolist())


def check_blocks(case: Case, fx: Fixture, model: ReducedViT, info: Info) -> None:
    """States stored per block: class token, sizes, source matrices, final tokens."""
    tol = fx.tolerance("features")
    for i, t in enumerate(info.trace):
        stored = fx.group(f"block{i}.")
        if "cls" in stored:
            case.close(f"block{i}.cls", t.x[:, 0], stored["cls"], tol)
        if "size" in stored:
            case.close(f"block{i}.size", t.size, stored["size"], (1e-5, 0.0))
        if "source" in stored:
            case.equal(f"block{i}.source", source_matrix(t), stored["source"])
    if "final_tokens" in fx.tensors:
        final = fx.tensors["final_tokens"]
        # Some references store the tokens before the final norm, some behind it.
        x = info.final.x
        normed = model.backbone.norm(x)
        near = min((x, normed), key=lambda y: (y - final).abs().max().item())
        case.close("final_tokens", near, final, tol)


def source_matrix(t: Tokens) -> Tensor:
    """0/1 matrix `(B, P+N, P+N0)` like the official ToMe's, prefix tokens included."""
    assert t.source is not None
    batch, n0 = t.source.shape
    out = torch.zeros(batch, t.prefix + t.n, t.prefix + n0, dtype=torch.uint8)
    for p in range(t.prefix):
        out[:, p, p] = 1
    for b in range(batch):
        for patch in range(n0):
            slot = int(t.source[b, patch])
            if slot >= 0:
                out[b, t.prefix + slot, t.prefix + patch] = 1
    return out


def check_stages(case: Case, fx: Fixture, info: Info) -> None:
    """Choices stored per stage: kept sets, fused sets, groups, tokens after the block."""
    groups: dict[int, list[set[int]]] = {}
    for stage, block in enumerate(fx.info.get("stage_blocks", [])):
        stored = fx.group(f"stage{stage}.")
        t = info.trace[block]
        assert t.source is not None
        if "origin_label" in stored:
            case.equal(f"stage{stage}.origin_label", labels(t.source), stored["origin_label"])
        if "source" in stored:
            ours = source_matrix(t)[:, t.prefix :, t.prefix :]
            case.equal(f"stage{stage}.source", ours, stored["source"])
        if "kept_abs" in stored:
            check_kept(case, stage, t, stored, groups)
        if "tokens_after_block" in stored:
            ours, theirs = sort_rows(t.x), sort_rows(stored["tokens_after_block"])
            case.close(f"stage{stage}.tokens", ours, theirs, fx.tolerance("features"))


def check_kept(
    case: Case,
    stage: int,
    t: Tokens,
    stored: dict[str, Tensor],
    groups: dict[int, list[set[int]]],
) -> None:
    """Compare kept patches as sets; a fused token (-1-s) stands for the patches fused into it."""
    assert t.source is not None
    kept = stored["kept_abs"]
    kept = kept if kept.dim() == 2 else kept.expand(t.x.shape[0], -1)
    for b in range(t.x.shape[0]):
        fused = groups.setdefault(b, [])
        if "fused_abs" in stored:
            members: set[int] = set()
            for i in stored["fused_abs"][b].tolist():
                members |= {i} if i >= 0 else fused[-1 - i]
            fused.append(members)
        theirs = sorted(sorted({i} if i >= 0 else fused[-1 - i]) for i in kept[b].tolist())
        slots: dict[int, list[int]] = {}
        for patch, slot in enumerate(t.source[b].tolist()):
            if slot >= 0:
                slots.setdefault(slot, []).append(patch)
        case.equal(f"stage{stage}.kept[{b}]", sorted(slots.values()), theirs)


def sort_rows(x: Tensor) -> Tensor:
    """Rows in an order that does not depend on the implementation."""
    order = x[..., 0].argsort(dim=1)
    return x.gather(1, order.unsqueeze(-1).expand_as(x))
