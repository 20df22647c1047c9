"""Cropr: what its routers see, what they learn from, and what comes back for the last block."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F

import zoo
from tests.cases import backbone, images
from zoo.errors import ZooError
from zoo.model.reduced import ReducedViT


def cropr(r: object = 8, depth: int = 5, name: str = "plain", **args: object) -> ReducedViT:
    m = backbone(name, depth=depth)
    torch.manual_seed(3)
    return zoo.wrap(m, {"name": "cropr", **args}, {"name": "constant_r", "r": r}).eval()


def test_the_last_block_has_every_patch_at_its_place() -> None:
    m, x = cropr([9, 8, 8, 0, 0]), images(2)
    with torch.no_grad():
        logits, info = m(x, return_info="trace")
    assert info.tokens == ((65, 56), (56, 48), (48, 40), (40, 65), (65, 65))
    back = info.trace[3]
    assert torch.equal(back.source, torch.arange(64).expand(2, -1)) and back.unit
    # What was parked is as it was when it was dropped.
    for b in range(2):
        gone = [p for p in range(64) if info.trace[0].source[b, p] < 0]
        assert len(gone) == 9
    with torch.no_grad():
        first = m.backbone.blocks[0](m.backbone._pos_embed(m.backbone.patch_embed(x)))
    for b in range(2):
        gone = [p for p in range(64) if info.trace[0].source[b, p] < 0]
        assert torch.equal(back.x[b, 1:][gone], first[b, 1:][gone])
    with torch.no_grad():
        last = m.backbone.blocks[4](back.x)
        assert torch.allclose(m.backbone.forward_head(m.backbone.norm(last)), logits, atol=1e-6)


def test_without_fusion_dropped_tokens_stay_away() -> None:
    m = cropr([9, 8, 8, 8, 0], llf=False)
    assert m.token_counts() == [(65, 56), (56, 48), (48, 40), (40, 32), (32, 32)]
    assert len(m.reducer.stages) == 4 and len(cropr([9, 8, 8, 0, 0]).reducer.stages) == 3


def test_the_best_scores_stay_whatever_the_length_of_the_query() -> None:
    m, x = cropr(depth=4), images(2)
    with torch.no_grad():
        expected = m(x)
        _, info = m(x, return_info="trace")
        first = m.backbone.blocks[0](m.backbone._pos_embed(m.backbone.patch_embed(x)))
        score = first[:, 1:] @ m.reducer.stages[0].cross_attn.queries[0, 0]
        best = score.topk(56, dim=1).indices.sort(1).values
        kept = torch.stack([(row >= 0).nonzero()[:, 0] for row in info.trace[0].source])
        assert torch.equal(kept, best)
        for stage in m.reducer.stages:
            stage.cross_attn.queries.mul_(7.0)
        assert torch.equal(m(x), expected)
        for name, value in m.reducer.named_parameters():
            if not name.endswith("queries"):
                value.normal_()
        assert torch.equal(m(x), expected)
        m.reducer.stages[0].cross_attn.queries.neg_()
        assert not torch.equal(m(x), expected)


def test_folded_scores_are_those_of_the_projected_cross_attention() -> None:
    args = dict(queries=3, heads=3, pre_norm=True, q_proj=True, k_proj=True, v_proj=True)
    m = cropr(**args)
    attention = m.reducer.stages[0].cross_attn
    x = torch.randn(2, 20, 48)
    with torch.no_grad():
        q = attention.q_proj(attention.queries).sum(1)
        k = attention.k_proj(attention.attn_norm(x))
        exact = (k * q).sum(-1)
        folded = attention.score(x)
    # The key bias adds the same to all tokens.
    assert torch.allclose(exact - exact[:, :1], folded - folded[:, :1], atol=1e-4)


def test_router_and_backbone_learn_from_their_own_losses() -> None:
    m, y = cropr(queries=2).train(), torch.tensor([1, 2])
    logits, info = m(images(), return_info="trace")
    own = m.auxiliary_losses(info, logits, y)["router"]
    own.backward(retain_graph=True)
    assert all(p.grad is None for p in m.backbone.parameters())
    assert all(p.grad is not None for p in m.reducer.parameters())
    m.zero_grad()
    F.cross_entropy(logits, y).backward()
    assert all(p.grad is None for p in m.reducer.parameters())
    answers = [info.final.memory[f"aux.{i}"] for i in range(3)]
    expected = sum((F.cross_entropy(a[:, 0], y) + F.cross_entropy(a[:, 1], y)) / 2 for a in answers)
    assert own.detach().item() == pytest.approx(float(expected), rel=1e-5)
    soft = F.one_hot(y, 10).float()
    assert m.auxiliary_losses(info, logits, soft)["router"].item() == pytest.approx(own.item())
    m.eval()
    logits, info = m(images(), return_info="trace")
    assert m.auxiliary_losses(info, logits, y) == {}


def test_heads_follow_a_new_classifier() -> None:
    m = cropr()
    m.reset_classifier(4)
    m.train()
    logits, info = m(images(), return_info="trace")
    own = m.auxiliary_losses(info, logits, torch.tensor([3, 0]))
    assert info.final.memory["aux.0"].shape == (2, 1, 4) and own["router"].isfinite()


def test_arguments_out_of_range() -> None:
    with pytest.raises(ZooError, match="must be 1 or more"):
        cropr(queries=0)
    with pytest.raises(ZooError, match="heads=5 must divide the width 48"):
        cropr(heads=5)


@pytest.mark.parametrize("llf", [True, False])
def test_tokens_of_a_plugin_are_left_alone(llf: bool) -> None:
    m = backbone("plain", depth=6)
    args = {"name": "cropr", "llf": llf}
    made = zoo.wrap(m, args, {"name": "constant_r", "r": [9, 8, 8, 8, 0, 0]}, ["clc"]).eval()
    with torch.no_grad():
        logits, info = made(images(), return_info=True)
    assert list(info.tokens) == made.token_counts() and logits.isfinite().all()
    assert (info.source >= 0).all() == llf


def test_official_names_of_projections_are_taken() -> None:
    args = {"q_proj": True, "k_proj": True, "v_proj": True, "heads": 3}
    source, goal = cropr(**args), cropr(**args)
    with torch.no_grad():
        for parameter in source.reducer.parameters():
            parameter.normal_()
    own = source.reducer.state_dict()
    official = {
        re.sub(r"\.([qkv])_proj\.", r".\1.", name): value.clone()
        for name, value in own.items()
        if not name.endswith(("k_proj.bias", "v_proj.bias"))
    }
    assert any(name.endswith("cross_attn.q.weight") for name in official)
    goal.reducer.load_state_dict(official)
    for name, value in goal.reducer.state_dict().items():
        without = name.endswith(("k_proj.bias", "v_proj.bias"))
        assert torch.equal(value, torch.zeros_like(value) if without else own[name]), name
    goal.reducer.load_state_dict(own)
    again = goal.reducer.state_dict()
    assert all(torch.equal(again[name], value) for name, value in own.items())
