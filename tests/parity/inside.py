"""FlowCut and IPCV: selectors inside the encoder, on blocks that are given with their input."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import zoo
from reduction.methods.flowcut import flow
from tests.parity.fixture import Case, Fixture
from tests.parity.runner import handles


class Fed(VisionTransformer):
    """A plain ViT whose blocks are given their tokens."""

    tokens: Tensor

    def _pos_embed(self, x: Tensor) -> Tensor:
        return self.tokens


def backbone(fx: Fixture, class_token: bool, tokens: Tensor) -> Fed:
    """The fixture's blocks; queries, keys and values are stored apart."""
    config = fx.config
    m = Fed(
        img_size=tuple(4 * side for side in config["grid"]),
        patch_size=4,
        num_classes=0,
        embed_dim=config["width"],
        depth=config["depth"],
        num_heads=config["heads"],
        mlp_ratio=config["mlp_ratio"],
        class_token=class_token,
        global_pool="token" if class_token else "avg",
        norm_layer=lambda width, **_: nn.LayerNorm(width, eps=config["layer_norm_eps"]),
    ).eval()
    state = {k: v.float() for k, v in fx.group("in.weights.").items()}
    given = {k.replace("mlp.", "mlp."): v for k, v in state.items() if ".attn." not in k}
    for i in range(config["depth"]):
        for part in ("weight", "bias"):
            stem = f"blocks.{i}.attn."
            parts = [state[f"{stem}{name}.{part}"] for name in "qkv"]
            given[f"{stem}qkv.{part}"] = torch.cat(parts)
            given[f"{stem}proj.{part}"] = state[f"{stem}proj.{part}"]
    missing, unexpected = m.load_state_dict(given, strict=False)
    assert not unexpected and not [name for name in missing if name.startswith("blocks.")]
    m.tokens = tokens
    return m


def pass_through(model: zoo.ReducedViT, fx: Fixture, batch: int) -> tuple:
    """Run the blocks, whatever the images are, and collect what each said of attention."""
    height, width = (4 * side for side in fx.config["grid"])
    with torch.no_grad():
        return model(torch.zeros(batch, 3, height, width), return_info="trace")[1]


@handles("flowcut")
def flowcut(fx: Fixture) -> Iterator[Case]:
    config, tokens = fx.config, fx.tensors["in.features"].float()
    m = backbone(fx, True, tokens)
    reducer = {"name": "flowcut", "target": config["target"], "compat_batch": True}
    schedule = {"name": "per_block", "keep": [None] * config["depth"]}
    model, case = zoo.wrap(m, reducer, schedule).eval(), Case(fx.name, "eval")
    seen = {}
    original = model.reducer.reduce

    def noted(t, s, step):  # type: ignore[no-untyped-def]
        seen[step.block] = s
        return original(t, s, step)

    model.reducer.__dict__["reduce"] = noted
    info = pass_through(model, fx, len(tokens))
    counts = [info.tokens[0][0] - 1, *(after - 1 for _, after in info.tokens)]
    case.equal("counts", counts, fx.tensors["out.counts"].tolist())
    last = info.trace[config["depth"] - 2]
    kept = torch.stack([(row >= 0).nonzero().flatten() for row in last.source])
    case.equal("indices", kept, fx.tensors["out.indices"])
    case.logits("tokens", last.patches, fx.tensors["out.tokens"], (1e-4, 1e-4))
    for block, s in seen.items():
        stored = fx.group(f"out.block{block}.")
        if not stored:
            continue
        case.close(f"{block}.cls_row", s.cls_row[:, :, 1:], stored["cls_row"], (1e-5, 1e-4))
        found = flow(s.cls_row, s.v, 1)
        case.close(f"{block}.semantic", found.semantic, stored["semantic"], (1e-5, 1e-4))
        case.close(f"{block}.value", s.v.mean(1)[:, 1:], stored["value"], (1e-5, 1e-4))
    yield case


@handles("ipcv")
def ipcv(fx: Fixture) -> Iterator[Case]:
    config, tokens = fx.config, fx.tensors["in.features"].float().unsqueeze(0)
    m = backbone(fx, False, tokens)
    n, first = tokens.shape[1], config["prune_block"]
    keep: list[int | None] = [None] * config["depth"]
    keep[first] = int(n * (1 - config["reduction_ratio"]))
    reducer = {
        "name": "ipcv",
        "stabilised": config["stabilised_blocks"],
        "neighbours": config["neighbours"],
    }
    model = zoo.wrap(m, reducer, {"name": "per_block", "keep": keep}).eval()
    case, info = Case(fx.name, "eval"), pass_through(model, fx, 1)
    final = info.final
    chosen = final.memory["ipcv.chosen"][0]
    case.equal("indices", chosen, fx.tensors["out.indices"])
    order = final.memory["ipcv.order"][0, : len(chosen)]
    case.equal("order", order, fx.tensors["out.order"])
    case.logits("tokens", final.x[0], fx.tensors["out.tokens"], (1e-4, 1e-4))
    for i, t in enumerate(info.trace):
        stored = fx.tensors.get(f"out.block{i}")
        if stored is not None:
            # Where all tokens have been rebuilt, the kept ones are what the block put out.
            x = t.x[0] if len(stored) == t.n else t.x[0, chosen]
            case.close(f"block{i}", x, stored, (1e-4, 1e-4))
    yield case
