"""TokenLearner: the official modules inside a plain ViT."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import zoo
from tests.parity.fixture import Case, Fixture, gradient_check
from tests.parity.runner import handles
from tests.parity.stages import check_blocks, check_counts


@handles("tokenlearner")
def tokenlearner(fx: Fixture) -> Iterator[Case]:
    config, net = fx.config, fx.backbone()
    learned = fx.group("reducer.tokenlearner.")
    loc, depth = config["loc"], len(net.blocks)
    args: dict[str, Any] = {
        "name": "tokenlearner",
        "version": "1.1" if config["v11"] else "1.0",
        "pooling": "sum" if config.get("sum_pooling", True) else "mean",
        "fuser": config["fuser"],
        "fuser_norm": config.get("fuser_norm", True),
    }
    for key, name in (("bottleneck", f"{loc}.fc1"), ("fuser_bottleneck", f"{loc}.fuser.fc1")):
        if f"{name}.weight" in learned:
            args[key] = learned[f"{name}.weight"].shape[0]
    keep = [config["num_tokens"] if b == loc else None for b in range(depth)]
    model = zoo.wrap(net, args, {"name": "per_block", "keep": keep}).eval()

    def ours(name: str) -> str:
        block, _, rest = name.partition(".")
        part = rest if rest.startswith("fuser.") else f"maps.{rest}"
        return f"stages.{int(block) - loc}.{part}"

    model.reducer.load_state_dict({ours(k): v.float() for k, v in learned.items()})
    entered: dict[int, Tensor] = {}
    for i, block in enumerate(net.blocks):
        block.register_forward_pre_hook(lambda _, x, i=i: entered.update({i: x[0]}))
    case = Case(fx.name, "eval")
    with torch.no_grad():
        dense = net(fx.images)
        logits, info = model(fx.images, return_info="trace")
    case.close("dense_logits", dense, fx.tensors["dense_logits"], fx.tolerance("dense_logits"))
    case.logits("logits", logits, fx.tensors["logits"], fx.tolerance("logits"))
    check_counts(case, fx, model, info)
    check_blocks(case, fx, model, info)
    for i in fx.info["stage_blocks"]:
        stored = fx.group(f"block{i}.").get("learned_tokens")
        if stored is not None:
            tokens = entered[i][:, model.prefix :]
            case.close(f"block{i}.learned_tokens", tokens, stored, fx.tolerance("features"))
    yield case
    if fx.group("grad."):
        case = Case(fx.name, "grad")
        logits = model(fx.images)
        case.logits("logits", logits, fx.tensors["logits"], fx.tolerance("logits"))
        names = {ours(k): f"tokenlearner.{k}" for k in learned}
        parts = [(names[k], p) for k, p in model.reducer.named_parameters()]
        gradient_check(case, fx, logits, [*net.named_parameters(), *parts])
        yield case
