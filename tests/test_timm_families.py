"""Further families of timm: exact with nothing reduced, every method on them, and their cost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from timm.models import vision_transformer

import reduction
import zoo
from reduction.mixins.gating import Gates
from reduction.tokens import OF_THE_MLP
from tests.cases import Row
from tests.covering import crossed
from tests.families import FAMILIES, family, first_rows, kind_of, pictures, reduced
from zoo.adapters.bias import bias_of
from zoo.cost.counters import torch_gmacs
from zoo.errors import UnsupportedModel

ALL = list(FAMILIES)
BIASED = [name for name in ALL if name.startswith(("beit", "relpos"))]
BESIDE = [n for n in ALL if n.startswith("scaling") or n in ("diff_scaling", "diff_dual")]
SIDE_BY_SIDE = [n for n in ALL if n.endswith("things")]
OLD = not hasattr(vision_transformer, "DiffParallelScalingBlock")
NOTHING = {"name": "constant_r", "r": 0}


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
@pytest.mark.parametrize("name", ALL)
def test_nothing_reduced_is_the_backbone_itself(name: str, fused: bool) -> None:
    backbone = family(name, fused=fused)
    x = pictures(backbone)
    with torch.no_grad():
        expected = backbone(x)
        assert torch.equal(zoo.wrap(backbone, "tome", NOTHING).eval()(x), expected)
        answer, info = zoo.wrap(backbone, None).eval()(x, return_info=True)
        assert torch.equal(answer, expected)
        assert torch.equal(
            zoo.wrap(backbone, None).eval().forward_features(x), backbone.forward_features(x)
        )
        assert info.size.eq(1).all()
        # By the way that serves whoever listens, to rounding.
        halves = zoo.wrap(backbone, None).eval().set_runtime(own_kernels=True)
        assert torch.allclose(halves(x), expected, atol=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_training_is_the_backbone_itself(name: str) -> None:
    backbone = family(name).train()
    x = pictures(backbone)
    model = zoo.wrap(backbone, "tome", NOTHING).train()
    torch.manual_seed(0)
    backbone(x).square().sum().backward()
    expected = {n: p.grad.clone() for n, p in backbone.named_parameters() if p.grad is not None}
    backbone.zero_grad()
    for remember in (False, True):
        model.set_grad_checkpointing(remember)
        torch.manual_seed(0)
        model(x).square().sum().backward()
        found = {n: p.grad.clone() for n, p in backbone.named_parameters() if p.grad is not None}
        assert found.keys() == expected.keys()
        assert all(torch.allclose(found[n], expected[n], atol=1e-4) for n in expected)
        backbone.zero_grad()


def needs_class_token(row: Row, backbone: Any) -> bool:
    """Whether a method says that it needs a class token which this backbone does not have."""
    tower = zoo.wrap(backbone, None).tower
    needs = reduction.create(**row.reducer()).needs_class_token
    return needs and not row.without_class_token and not tower.class_tokens(backbone)


def refusal(row: Row, name: str) -> str:
    """What a method acts on that the blocks of a family do not have; empty if nothing."""
    method = reduction.create(**row.reducer())
    if method.site == "attn" and name in BESIDE:
        return "inside the attention, but in a .* beside it"
    if method.needs & OF_THE_MLP and name in BESIDE:
        return "no one MLP whose answer"
    if isinstance(method, Gates) and name in SIDE_BY_SIDE:
        return "switches parts of the MLP, and .* has no one MLP"
    return ""


@pytest.mark.parametrize(("row", "name"), crossed(first_rows(), ALL, kind_of))
def test_every_method(row: Row, name: str) -> None:
    backbone = family(name)
    if needs_class_token(row, backbone):
        pytest.skip("needs a class token")
    if why := refusal(row, name):
        with pytest.raises(UnsupportedModel, match=why):
            reduced(row, backbone)
        return
    model = reduced(row, backbone)
    x = pictures(backbone, 3)
    with torch.no_grad():
        answer, info = model(x, return_info=True)
        assert answer.shape == (3, 5) and answer.isfinite().all()
        assert torch.equal(answer, model(x, return_info=True)[0])
        if row.name not in ("random", "sinkhorn"):
            single = torch.cat([model(x[i : i + 1]) for i in range(3)])
            assert torch.allclose(answer, single, atol=1e-4)
    planned = [(p.entering, p.leaving) for p in model.plan()]
    assert len(info.tokens) == len(planned)
    assert all(
        found[0] <= plan[0] and found[1] <= plan[1]
        for found, plan in zip(info.tokens, planned, strict=True)
    )


@pytest.mark.parametrize("name", ALL)
def test_cost_is_what_torch_counts(name: str) -> None:
    backbone = family(name)
    if name == "naflex_mixed" and OLD:
        pytest.skip("this timm multiplies positions and frequencies by a product of matrices")
    x = pictures(backbone, 1)
    for model in (zoo.wrap(backbone, None), zoo.wrap(backbone, "random", {"name": "keep_rate"})):
        assert zoo.profile(model).gmacs == pytest.approx(torch_gmacs(model, x), rel=1e-6)
    assert zoo.profile(model).dense == pytest.approx(torch_gmacs(backbone, x), rel=1e-6)


# ------------------------------------------------------------------------------------------ biases


def test_bias_follows_the_tokens() -> None:
    full = torch.randn(2, 7, 7)
    t = reduction.Tokens.start(torch.randn(2, 7, 4), 1, track=True)
    assert torch.equal(bias_of(full, t, False), full[None])
    origin = torch.tensor([[3, 0, -1], [5, 5, 1]])
    t = t._replace(x=t.x[:, :4], origin=origin)
    found = bias_of(full, t, True)
    assert found.shape == (2, 2, 4, 4)
    for b in range(2):
        rows = [0, *(origin[b] + 1).tolist()]
        for i, p in enumerate(rows):
            for j, q in enumerate(rows):
                lost = (i and origin[b, i - 1] < 0) or (j and origin[b, j - 1] < 0)
                expected = torch.zeros(2) if lost else full[:, p, q]
                assert torch.equal(found[b, :, i, j], expected)


@pytest.mark.parametrize("name", BIASED)
def test_dropped_tokens_leave_the_others_their_bias(name: str) -> None:
    """Dropping tokens is what hiding them from every later attention is."""
    backbone = family(name)
    tower, x = zoo.wrap(backbone, None).tower, pictures(backbone)
    model = zoo.wrap(
        backbone, {"name": "random", "seed": 3}, {"name": "keep_rate", "rate": 0.5, "blocks": [1]}
    ).eval()
    with torch.no_grad():
        _, info = model(x, return_info="trace")
        embedded = tower.embed(backbone, x)
        prefix = tower.prefix(backbone)
        hidden = torch.zeros(x.shape[0], 1, 1, embedded.x.shape[1])
        hidden[:, 0, 0, prefix:].masked_fill_(info.source < 0, -torch.inf)
        h = embedded.x
        for i, block in enumerate(backbone.blocks):
            start = reduction.Tokens.start(h, prefix)
            bias = tower.bias(backbone, embedded, i, start, False)
            h = seen(block, h, bias + hidden if i > 1 else bias)
        kept = [h[b, prefix:][info.source[b] >= 0] for b in range(len(h))]
    assert torch.allclose(info.final.patches, torch.stack(kept), atol=1e-4)


def seen(block: Any, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """A block with another bias than its own."""
    own = "rel_pos" if hasattr(block.attn, "rel_pos") else "relative_position_bias_table"
    kept = getattr(block.attn, own)
    if own == "rel_pos":
        block.attn.rel_pos = None
        shared = {"shared_rel_pos": bias}
    else:
        block.attn.relative_position_bias_table = None
        shared = {"shared_rel_pos_bias": bias}
    try:
        return block(x, **shared)
    finally:
        setattr(block.attn, own, kept)
