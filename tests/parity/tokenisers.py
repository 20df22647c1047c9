"""APT and CTS: entropies, layouts, tokens that enter the first block."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

import zoo
from reduction.functional.cells import entropies, grey
from tests.parity.fixture import Case, Fixture
from tests.parity.learned import check_alone
from tests.parity.runner import handles
from zoo.model.reduced import ReducedViT
from zoo.model.stream import Info


def first_tokens(model: ReducedViT, images: Tensor) -> tuple[Tensor, Info]:
    """What enters block 0, before its norm, and the rest of the pass."""
    seen: list[Tensor] = []
    hook = model.backbone.blocks[0].register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with torch.no_grad():
        _, info = model(images, return_info=True)
    hook.remove()
    return seen[0], info


@handles("apt")
def apt(fx: Fixture) -> Iterator[Case]:
    config = fx.config
    pixels = fx.tensors["image_u8"].float() / 255
    images = (pixels - 0.5) / 0.5
    patch, *coarse = config["scales"]
    depth = fx.info["timm"]["kwargs"]["depth"]
    schedule = {"name": "per_block", "keep": [None] * depth}
    reducer = {"name": "apt", "thresholds": config["thresholds"]}
    model = zoo.wrap(fx.backbone(), reducer, schedule).eval()
    grid = (pixels.shape[2] // patch, pixels.shape[3] // patch)
    case = Case(fx.name, "entropies")
    for s, side in enumerate([patch, *coarse]):
        if f"entropy.{side}" in fx.tensors:
            ours = entropies(grey(pixels), grid, s)
            case.close(f"entropy.{side}", ours, fx.tensors[f"entropy.{side}"].flatten(1), (1e-4, 0))
    yield case
    case = Case(fx.name, "untrained")
    with torch.no_grad():
        dense, logits = model.backbone(images), model(images)
    case.close("dense_logits", dense, fx.tensors["dense_logits"], fx.tolerance("dense_logits"))
    case.logits("logits", logits, fx.tensors["logits_zero_conv_off"], fx.tolerance("logits"))
    yield case
    case = Case(fx.name, "trained")
    model.reducer.load_state_dict({k: v.float() for k, v in fx.group("reducer.").items()})
    entering, info = first_tokens(model, images)
    a = model.reducer.layout(images, grid)
    for b in range(len(images)):
        layout = fx.tensors[f"img{b}.layout"]
        n = len(layout)
        case.equal(f"img{b}.count", int(info.source[b].max()) + 1, n)
        row, column = a.leader[b, :n] // grid[1], a.leader[b, :n] % grid[1]
        sizes = info.size[b, model.prefix :][:n]
        scale = (sizes.log2() / 2).round().long()
        ours = torch.stack([scale, row >> scale, column >> scale], 1)
        case.equal(f"img{b}.layout", ours, layout)
        stored = fx.tensors[f"img{b}.tokens0"]
        case.close(f"img{b}.tokens0", entering[b, : len(stored)], stored, (1e-4, 1e-4))
    with torch.no_grad():
        logits = model(images)
    case.logits("logits", logits, fx.tensors["logits"], fx.tolerance("logits"))
    check_alone(case, model, images, fx.tensors["logits"])
    yield case


class Given(nn.Module):
    """A policy that answers what is stored."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, images: Tensor) -> Tensor:
        return self.logits


@handles("cts")
def cts(fx: Fixture) -> Iterator[Case]:
    depth = fx.info["timm"]["kwargs"]["depth"]
    keep = [fx.config["tokens"]] + [None] * (depth - 1)
    reducer = {"name": "cts", "policy": "module"}
    model = zoo.wrap(fx.backbone(), reducer, {"name": "per_block", "keep": keep}).eval()
    model.reducer.policy = Given(fx.tensors["policy_logits"].float())
    case, images = Case(fx.name, "eval"), fx.images
    entering, info = first_tokens(model, images)
    case.close("tokens0", entering, fx.tensors["tokens0"], (1e-4, 1e-4))
    case.equal("source", info.source, fx.tensors["source"])
    grid = model.grid
    step = model.plan()[0].entry
    assert step is not None
    a = model.reducer.layout(images, grid, step)
    side = torch.where(info.size[:, model.prefix :] > 1, 2, 1)
    codes = torch.stack([side, a.leader // grid[1], a.leader % grid[1]], 2)
    case.equal("codes", codes, fx.tensors["codes"])
    with torch.no_grad():
        dense, logits = model.backbone(images), model(images)
    case.close("dense_logits", dense, fx.tensors["dense_logits"], fx.tolerance("dense_logits"))
    case.logits("logits", logits, fx.tensors["logits"], fx.tolerance("logits"))
    x, final = info.final.x, fx.tensors["final_tokens"]
    near = min((x, model.backbone.norm(x)), key=lambda y: (y - final).abs().max().item())
    case.close("final_tokens", near, final, fx.tolerance("features"))
    yield case
