"""Selectors behind the tower, with `compat="official"`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import reduction
from reduction.selection.base import Selection
from tests.parity.fixture import Case, Fixture
from tests.parity.runner import handles


def _parts(fx: Fixture) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Inputs and outputs; the class token, where it comes with the features, by itself."""
    given, wanted = fx.group("in."), fx.group("out.")
    grid = fx.config.get("grid") or fx.config.get("patch_grid")
    patches = grid[0] * grid[1]
    x = given.get("features")
    if x is not None and x.shape[1] == patches + 1:
        given |= {"features": x[:, 1:], "class_token": x[:, 0]}
    return given, wanted


def _select(fx: Fixture, method: str, given: dict[str, Tensor], **options: Any) -> Selection:
    grid = tuple(fx.config.get("grid") or fx.config["patch_grid"])
    options = {"keep": fx.config.get("keep"), "compat": "official", **options}
    return reduction.select(method=method, grid=grid, **given, **options)


def _compare(fx: Fixture, chosen: Selection, wanted: dict[str, Tensor]) -> Iterator[Case]:
    """What most fixtures hold: indices, order and tokens."""
    case = Case(fx.name, "select")
    rows = {"indices": chosen.indices, "order": chosen.order, "mask": chosen.mask()}
    for name, ours in rows.items():
        if name in wanted:
            case.equal(name, ours, wanted[name])
    if "counts" in wanted:
        case.equal("counts", chosen.valid, wanted["counts"])
    if "tokens" in wanted:
        tol = fx.tolerance("tokens and other floats")
        case.logits("tokens", chosen.features, wanted["tokens"], tol)
    yield case


@handles("fastervlm")
def fastervlm(fx: Fixture) -> Iterator[Case]:
    given, wanted = _parts(fx)
    yield from _compare(fx, _select(fx, "fastervlm", given), wanted)
    if "score" in wanted:
        case = Case(fx.name, "score")
        n = given["features"].shape[1]
        score = given["cls_row"].mean(1)[:, -n:]
        case.logits("score", score, wanted["score"], fx.tolerance("tokens and other floats"))
        yield case


@handles("visionzip")
def visionzip(fx: Fixture) -> Iterator[Case]:
    given, wanted = _parts(fx)
    dominant, targets = fx.config["dominant"], fx.config["contextual"]
    chosen = _select(fx, "visionzip", given, keep=dominant + targets, targets=targets)
    indices = wanted.pop("indices")
    derived = fx.group("derived.")
    (case,) = _compare(fx, chosen, wanted)
    case.equal("indices", chosen.order[:, : dominant - 1], indices)
    case.equal("targets", chosen.order[:, dominant - 1 :], derived["contextual_index"])
    # Ours count rows; targets are members of their own slot.
    slot = (chosen.slot - dominant).clamp_min(-1)
    case.equal("assignment", slot, derived["assignment"])
    yield case


@handles("vispruner")
def vispruner(fx: Fixture) -> Iterator[Case]:
    given, wanted = _parts(fx)
    options = {"important": fx.config["important_ratio"], "per_round": fx.config["per_round"]}
    yield from _compare(fx, _select(fx, "vispruner", given, **options), wanted)


@handles("prumerge")
def prumerge(fx: Fixture) -> Iterator[Case]:
    given, wanted = _parts(fx)
    given.pop("class_token", None)
    config = fx.config
    name = {"base": "prumerge", "plus": "prumerge_plus"}[config["variant"]]
    options = {"adaptive": config["adaptive"], "neighbours": config["neighbours"]}
    ratio, n = config["fixed_ratio"], given["features"].shape[1]
    keep = None if ratio is None else int(n * ratio) + 1
    chosen = _select(fx, name, given, keep=keep, **options)
    indices = wanted.pop("indices")
    (case,) = _compare(fx, chosen, wanted)
    case.equal("indices", chosen.indices[:, :-1], indices)
    case.equal("order", chosen.order, indices)
    yield case


@handles("hiprune")
def hiprune(fx: Fixture) -> Iterator[Case]:
    given, wanted = _parts(fx)
    for name in ("shallow", "deep"):
        tail = "_shallow" if name == "shallow" else ""
        for stored in (f"column_{name}", f"attn_{name}"):
            if stored in given:
                value = given.pop(stored)
                given[f"column{tail}"] = value.mean((1, 2)) if value.dim() == 4 else value
    yield from _compare(fx, _select(fx, "hiprune", given, alpha=fx.config["alpha"]), wanted)


@handles("holov")
def holov(fx: Fixture) -> Iterator[Case]:
    given, wanted = _parts(fx)
    options = {"segments": fx.config["segments"], "beta": fx.config["beta"]}
    yield from _compare(fx, _select(fx, "holov", given, **options), wanted)


@handles("scope")
def scope(fx: Fixture) -> Iterator[Case]:
    given, wanted = _parts(fx)
    combine = {"multi": "product", "add": "add"}[fx.config["combine"]]
    options = {"alpha": fx.config["alpha"], "combine": combine}
    yield from _compare(fx, _select(fx, "scope", given, **options), wanted)


@handles("divprune")
def divprune(fx: Fixture) -> Iterator[Case]:
    given, wanted = _parts(fx)
    chosen = _select(fx, "divprune", given, keep=fx.config.get("ratio", fx.config.get("keep")))
    (case,) = _compare(fx, chosen, wanted)
    case.equal("keep", chosen.order.shape[1], fx.config["keep"])
    yield case


@handles("cdpruner")
def dpp(fx: Fixture) -> Iterator[Case]:
    given, wanted = _parts(fx)
    given = {k: v for k, v in given.items() if k not in ("image_embeds", "text_embeds")}
    given["quality"] = fx.tensors["derived.quality"]
    yield from _compare(fx, _select(fx, "dpp", given), wanted)


@handles("hired")
def hired(fx: Fixture) -> Iterator[Case]:
    given, wanted = _parts(fx)
    config = fx.config
    options: dict[str, Any] = {}
    if "crop_grid" in config:
        given["cls_row"] = given.pop("cls_row_last")
        given["cls_row_shallow"] = given.pop("cls_row_first")
        options = {"crops": config["crop_grid"], "alpha": config["alpha"]}
    if "features" not in given:
        row = given["cls_row"]
        given["features"] = torch.zeros(row.shape[0], row.shape[2] - 1, 1)
    chosen = _select(fx, "hired", given, keep=config["rate"], **options)
    yield from _compare(fx, chosen, wanted)


@handles("vscan")
def vscan(fx: Fixture) -> Iterator[Case]:
    given, wanted = _parts(fx)
    given["cls_row"] = given.pop("cls_row_deep")
    options = {"window": fx.config["window"], "local": fx.config["local_share"]}
    yield from _compare(fx, _select(fx, "vscan", given, **options), wanted)


@handles("apet")
def apet(fx: Fixture) -> Iterator[Case]:
    given, wanted = _parts(fx)
    given.pop("class_token", None)
    options = {"basis": fx.config["basis"], "ridge": fx.config["ridge"]}
    (case,) = _compare(fx, _select(fx, "apet", given, **options), wanted)
    from reduction.selection.given import given as checked
    from reduction.selectors.apet import ApET

    seen = checked(given["features"], {"start": given["start"]})
    basis, errors = ApET(**options).errors(seen, fx.config["basis"])
    case.equal("basis", basis, wanted["basis"])
    case.close("errors", errors, wanted["errors"], fx.tolerance("tokens and other floats"))
    yield case


@handles("prunesid")
def prunesid(fx: Fixture) -> Iterator[Case]:
    given, wanted = _parts(fx)
    indices = wanted.pop("indices")
    chosen = _select(fx, "prunesid", given)
    (case,) = _compare(fx, chosen, wanted)
    case.equal("indices", chosen.indices[:, 1:], indices)
    if "groups" in wanted:
        from reduction.selectors.prunesid import components

        case.equal("groups", components(given["features"], fx.config["groups"]), wanted["groups"])
    yield case


@handles("dart")
def dart(fx: Fixture) -> Iterator[Case]:
    given, wanted = _parts(fx)
    keep = 1 - fx.config["reduction_ratio"]
    chosen = _select(fx, "dart", given, keep=keep, pivots=fx.config["pivots"])
    yield from _compare(fx, chosen, wanted)
