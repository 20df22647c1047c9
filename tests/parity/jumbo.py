"""Jumbo: the official model in its final form, on its own grid and on changed ones."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import zoo
from tests.parity.fixture import Case, Fixture, Unsupported
from tests.parity.runner import handles
from zoo.adapters.tower import tower_of
from zoo.models.jumbo import Jumbo
from zoo.models.jumbo_weights import infer_args

# What the official constructor takes and does not use.
IGNORED = {"init_values", "device"}
KNOWN = {
    "img_size",
    "patch_size",
    "in_chans",
    "num_classes",
    "embed_dim",
    "depth",
    "num_heads",
    "mlp_ratio",
    "qkv_bias",
    "drop_path_rate",
}


@handles("jumbo")
def jumbo(fx: Fixture) -> Iterator[Case]:
    kwargs = arguments(fx)
    state = {k: v for k, v in fx.tensors.items() if not k.startswith("golden.")}
    model = Jumbo(**kwargs).eval()
    model.load_state_dict(state)
    yield weights(fx, kwargs, model, state)
    yield forward(fx, model)
    if any(k.startswith("golden.grad.") for k in fx.tensors):
        yield gradients(fx, model)
    for k, change in enumerate(fx.info.get("grid_changes", [])):
        yield resized(fx, copy.deepcopy(model), change, f"grid{k}")
        dynamic = Jumbo(**kwargs, dynamic_img_size=True).eval()
        dynamic.load_state_dict(state)
        yield grid(fx, dynamic, change, f"grid{k}-dynamic")


def arguments(fx: Fixture) -> dict[str, Any]:
    """Constructor arguments of ours from the official ones."""
    spec = fx.info["constructor"]
    given = {k: v for k, v in spec["kwargs"].items() if k not in IGNORED}
    if set(given) - KNOWN:
        raise Unsupported(f"constructor arguments {sorted(set(given) - KNOWN)}")
    plain = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    return {**plain, "jumbo_tokens": spec["J"]}


def tolerance(fx: Fixture, key: str) -> tuple[float, float]:
    entry = fx.info["tolerances"].get(key, {})
    return float(entry.get("suggested_atol", 1e-5)), float(entry.get("suggested_rtol", 1e-4))


def check(case: Case, fx: Fixture, what: str, ours: Tensor, where: str = "golden.") -> None:
    key = f"{where}{what}"
    if key not in fx.tensors:
        return
    method = case.logits if what == "logits" else case.close
    method(what, ours, fx.tensors[key], tolerance(fx, key))


def weights(fx: Fixture, kwargs: dict[str, Any], model: Jumbo, state: dict[str, Tensor]) -> Case:
    """The official names both ways, and the architecture from them."""
    case = Case(fx.name, "weights")
    ours = {k: list(v.shape) for k, v in model.state_dict().items()}
    case.equal("keys", ours, fx.info["state_dict_keys"])
    inferred = infer_args(state, kwargs["num_heads"], kwargs.get("img_size"))
    for name in ("jumbo_tokens", "embed_dim", "depth", "num_classes"):
        if name in kwargs:
            case.equal(name, inferred[name], kwargs[name])
    case.equal("jumbo_mlp", (inferred["jumbo_mlp"], inferred["jumbo_mlp_ratio"]), ("shared", 4.0))
    return case


def forward(fx: Fixture, model: Jumbo) -> Case:
    case = Case(fx.name, "eval")
    x = fx.tensors["golden.input"]
    wrapped = zoo.wrap(model, None).eval()
    with torch.no_grad():
        features = model.forward_features(x)
        check(case, fx, "tokens0", tower_of(model).embed(model, x).x)
        logits, info = wrapped(x, return_info="trace")
        for i, t in enumerate(info.trace):
            check(case, fx, f"block{i}", t.x)
        check(case, fx, "features", features)
        check(case, fx, "pre_logits", model.forward_head(features, pre_logits=True))
        check(case, fx, "logits", logits)
        check(case, fx, "logits", model(x))
        check(case, fx, "attn", model.attention_map(x))
    return case


def gradients(fx: Fixture, model: Jumbo) -> Case:
    case = Case(fx.name, "grad")
    model.zero_grad()
    logits = model(fx.tensors["golden.input"])
    loss = torch.nn.functional.cross_entropy(logits, fx.tensors["golden.labels"])
    loss.backward()
    check(case, fx, "logits", logits)
    check(case, fx, "loss", loss)
    named = dict(model.named_parameters())
    for key in fx.tensors:
        if key.startswith("golden.grad."):
            name = key.removeprefix("golden.grad.")
            grad = named[name].grad
            case.close(
                f"grad {name}",
                torch.zeros(()) if grad is None else grad,
                fx.tensors[key],
                tolerance(fx, key),
            )
    for name, norm in fx.info.get("grad_norms_f64", {}).items():
        grad = named[name].grad
        if norm is None:
            case.equal(f"grad norm {name}", grad is None, True)
        else:
            ours = torch.zeros(()) if grad is None else grad.norm()
            case.close(f"grad norm {name}", ours, torch.tensor(norm), (1e-6, 1e-4))
    return case


def resized(fx: Fixture, model: Jumbo, change: dict[str, Any], name: str) -> Case:
    """`set_input_size` there, back, and there again: the trained table must survive."""
    native = model.patch_embed.img_size
    original = model.pos_embed.clone()
    with torch.no_grad():
        before = model(fx.tensors["golden.input"])
        model.set_input_size(tuple(change["image_hw"]))
        model.set_input_size(native)
        again = model(fx.tensors["golden.input"])
    model.set_input_size(tuple(change["image_hw"]))
    case = grid(fx, model, change, name)
    case.equal("and back", again, before)
    case.equal("table", model.pos_embed, original)
    return case


def grid(fx: Fixture, model: Jumbo, change: dict[str, Any], name: str) -> Case:
    case = Case(fx.name, name)
    where = change["prefix"]
    x = fx.tensors[f"{where}input"]
    with torch.no_grad():
        patches = model.embed_patches(x)
        unplaced = model.patch_embed(x)
        unplaced = unplaced.flatten(1, 2) if unplaced.dim() == 4 else unplaced
        check(case, fx, "pos_embed", (patches - unplaced)[:1], where)
        check(case, fx, "features", model.forward_features(x), where)
        check(case, fx, "logits", zoo.wrap(model, None).eval()(x), where)
        map_ = model.attention_map(x)
        case.equal("new grid", list(map_.shape[1:]), list(change["new_grid"]))
        check(case, fx, "attn", map_, where)
    return case
