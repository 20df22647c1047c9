"""CubistMerge: indices of both passes, tokens, sizes, and what unmerging gives back."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from reduction.assignment import unmerge
from reduction.functional.lines import thin
from reduction.tokens import Tokens
from tests.parity.fixture import Case, Fixture
from tests.parity.runner import handles
from tests.parity.stages import build, check_blocks, check_counts, evaluated


@handles("cubistmerge")
def cubistmerge(fx: Fixture) -> Iterator[Case]:
    config, depth = fx.config, fx.info["timm"]["kwargs"]["depth"]
    steps = config["steps"]
    last_writer = config.get("compat_last_writer", True)
    keep: list[int | None] = [None] * depth
    rows, columns = config["grid"]
    for step in steps:
        rows, columns = rows - step["rh"], columns - step["rw"]
        keep[step["block"]] = rows * columns
    reducer = {
        "name": "cubistmerge",
        "rows": [s["rh"] for s in steps],
        "columns": [s["rw"] for s in steps],
        "compat_last_writer": last_writer,
    }
    model = build(fx, reducer, {"name": "per_block", "keep": keep})
    case, info = evaluated(fx, model)
    check_counts(case, fx, model, info)
    check_blocks(case, fx, model, info)
    tol = fx.tolerance("features")
    for i, t in enumerate(info.trace):
        if f"block{i}.tokens" in fx.tensors:
            case.close(f"block{i}.tokens", t.x, fx.tensors[f"block{i}.tokens"], tol)
    rows, columns = config["grid"]
    for step in steps:
        i = step["block"]
        before = info.trace[i - 1].patches
        x = before.reshape(-1, columns, before.shape[2])
        for name, lines, r in (("h", rows, step["rw"]), ("v", columns - step["rw"], step["rh"])):
            done = thin(x, r, last_writer=last_writer)
            case.equal(f"block{i}.{name}.src", done.source, fx.tensors[f"block{i}.{name}.src"])
            case.equal(f"block{i}.{name}.dst", done.target, fx.tensors[f"block{i}.{name}.dst"])
            x = done.x.view(-1, lines, *done.x.shape[1:]).transpose(1, 2).flatten(0, 1)
        whole = Tokens.start(torch.cat([info.trace[i - 1].x], 1), model.prefix, track=True)
        budget = model.plan()[i].step
        assert budget is not None
        merged = model.reducer.reduce(whole, None, budget)
        own = merged._replace(x=info.trace[i].x)
        case.close(f"block{i}.recovered", unmerge(own), fx.tensors[f"block{i}.recovered"], tol)
        rows, columns = rows - step["rh"], columns - step["rw"]
    yield case
