"""DTEM: the relaxed choice, soft merging, and who gets a gradient."""

from __future__ import annotations

import pytest
import torch

import zoo
from reduction.counts import Budget, Step
from reduction.functional.matching import unit
from reduction.methods.dtem import active_tokens, relaxed_top_r, sized_attention, soft_assignment
from reduction.mixins.attention import AttentionInput
from reduction.tokens import Signals, Tokens
from tests.cases import backbone, images
from zoo.errors import ZooError


def build(r=8, name="plain", **args):
    return zoo.wrap(backbone(name), {"name": "dtem", **args}, {"name": "constant_r", "r": r})


def embeddings(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(2, n, 6, generator=torch.Generator().manual_seed(seed))


def test_a_cold_choice_is_the_hard_top_r() -> None:
    a, b = embeddings(9), embeddings(8, 1)
    move = soft_assignment(a, b, 4, 3, 0.1, 1e-4)
    assert ((move < 1e-4) | (move > 1 - 1e-4)).all()
    assert torch.allclose(move.sum((1, 2)), torch.full((2,), 4.0))
    assert (move.sum(2) < 1 + 1e-5).all()
    best, nearest = (unit(a) @ unit(b).transpose(1, 2)).max(2)
    for i in range(2):
        rows = best[i].topk(4).indices
        assert (move[i, rows, nearest[i, rows]] > 0.99).all()


def test_a_warm_choice_never_moves_more_than_a_whole_token() -> None:
    score = embeddings(5) / 3
    taken = relaxed_top_r(score, 5, 2.0)
    assert torch.allclose(taken.sum((1, 2)), torch.full((2,), 5.0))
    assert taken.sum(2).max() > 1  # so that the cap below does something
    move = soft_assignment(embeddings(5), embeddings(7, 1), 5, 7, 0.1, 2.0)
    assert move.sum(2).max() <= 1 + 1e-6


def test_only_the_nearest_goals_are_candidates() -> None:
    move = soft_assignment(embeddings(6), embeddings(7, 1), 3, 2, 1.0, 1.0)
    assert ((move > 0).sum(2) == 2).all()


@pytest.mark.parametrize("name", ["plain", "registers", "distilled", "gap", "eva02"])
@pytest.mark.parametrize("split", ["official", "eval"])
def test_training_keeps_every_token_and_all_of_the_size(name: str, split: str) -> None:
    model = build(name=name, tau1=1.0, tau2=0.5, train_split=split).train()
    logits, info = model(images(), return_info="trace")
    assert logits.isfinite().all()
    for i, t in enumerate(info.trace):
        assert t.n == 64 and active_tokens(t) == 64 - 8 * (i + 1)
        assert torch.allclose(t.size.sum(1), torch.full((2,), 64.0 + t.prefix), atol=1e-3)
        assert torch.equal(t.size[:, : t.prefix], torch.ones(2, t.prefix))
        assert (t.size >= 0).all() and t.size.std() > 0
        inner = t.size[:, t.prefix : t.prefix + 8 * (8 - i)].detach()
        assert torch.equal(inner.sort(1, descending=True).values, inner)
        # Every patch is in its own slot: none is removed or counted twice.
        assert torch.equal(t.source.sort(1).values, torch.arange(64).expand(2, -1))


def test_training_like_evaluation_where_the_choice_is_hard() -> None:
    """One cold merge with the sets of evaluation gives what evaluation gives."""
    r = [9, 0, 0, 0]
    model = build(r, train_split="eval", tau2=1e-3)
    swapped = build(r, tau2=1e-3)
    swapped.load_state_dict(model.state_dict())
    with torch.no_grad():
        evaluated = model.eval()(images())
        trained = model.train()(images())
        other = swapped.train()(images())
    assert torch.allclose(trained, evaluated, atol=1e-3)
    assert (other - evaluated).abs().max() > 0.01


def test_the_embedding_sends_no_gradient_to_the_backbone() -> None:
    reducer = build([9, 0, 0, 0]).train().reducer
    x, x_norm = torch.randn(2, 65, 48), torch.randn(2, 65, 48, requires_grad=True)
    t = reducer.begin(Tokens.start(x.requires_grad_(), 1))
    out = reducer.reduce(t, Signals(x_norm=x_norm), Step(0, 4, Budget(55), (8, 8)))
    (out.x.square().sum() + out.size.square().sum()).backward()
    assert x_norm.grad is None and x.grad.abs().max() > 0
    assert all(p.grad.abs().max() > 0 for p in reducer.parameters())


def test_a_frozen_backbone_stays_as_it_is() -> None:
    from zoo.lit.classifier import Classifier

    module = Classifier(build(), train_only=["reducer.*"]).train()
    assert not module.net.backbone.training and module.net.reducer.training
    module.net(images()).square().mean().backward()
    assert all(p.grad is None for p in module.net.backbone.parameters())
    assert module.net.reducer.blocks["0"].weight.grad.abs().max() > 0


def test_evaluation_uses_the_weights_of_now() -> None:
    model = build().eval()
    with torch.no_grad():
        before = model(images())
        model.reducer.blocks["0"].weight.neg_()
        model.reducer.blocks["0"].weight[0] += 3
        assert (model(images()) - before).abs().max() > 1e-4


def test_sized_attention_is_attention_to_repeated_keys() -> None:
    q, k, v = (
        torch.randn(1, 2, 3, 4, generator=torch.Generator().manual_seed(i)) for i in range(3)
    )
    size = torch.tensor([[1.0, 2.0, 0.0]], requires_grad=True)
    given = AttentionInput(q, k, v, 0.5, None, 0.0, True, frozenset())
    out = sized_attention(given, size)
    rows = [0, 1, 1]
    repeated = (q * 0.5 @ k[:, :, rows].transpose(2, 3)).softmax(-1) @ v[:, :, rows]
    assert torch.allclose(out, repeated, atol=1e-6)
    out.square().sum().backward()
    assert size.grad.isfinite().all() and size.grad[0, 2] != 0


def test_embeddings_survive_another_schedule() -> None:
    model = build([8, 8, 0, 0])
    weight = model.reducer.blocks["1"].weight
    again = zoo.wrap(model.unwrap(), model.reducer, {"name": "constant_r", "r": [0, 5, 5, 0]})
    assert list(again.reducer.blocks) == ["1", "2"]
    assert again.reducer.blocks["1"].weight is weight
    again.schedule = zoo.wrap(backbone("plain"), "tome", {"name": "constant_r", "r": 2}).schedule
    with pytest.raises(ZooError, match=r"embeddings for blocks \[1, 2\].*reduces in block 0"):
        again.eval()(images())


def test_training_survives_mixed_precision() -> None:
    model = build().train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(images()).float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.reducer.blocks["0"].parameters())


@pytest.mark.parametrize(
    "args", [{"neighbors": 0}, {"tau1": 0.0}, {"tau2": -1}, {"train_split": "x"}, {"feat_dim": 0}]
)
def test_arguments_out_of_range_are_refused(args) -> None:
    with pytest.raises(ZooError, match=next(iter(args))):
        zoo.wrap(backbone("plain"), {"name": "dtem", **args}, None)
