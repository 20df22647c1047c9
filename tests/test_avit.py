"""A-ViT: the weights of a token sum to one, whatever halts when."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import zoo
from reduction.errors import ZooError
from reduction.methods.avit import prior_divergence, prior_target
from tests.cases import backbone, images

UNLIMITED = {"name": "keep_rate", "rate": 1.0}
MOVING = {"scale": 3.0, "center": 2.0}


def avit(
    name: str = "plain", schedule: dict | None = None, **args: object
) -> zoo.model.reduced.ReducedViT:
    return zoo.wrap(backbone(name), {"name": "avit", **args}, schedule or UNLIMITED).eval()


@pytest.mark.parametrize(
    "name", ["plain", "distilled", "registers", "gap", "map", "eva02", "jumbo"]
)
def test_nobody_halts_before_the_end(name: str) -> None:
    m, x = avit(name, center=1e4), images()
    with torch.no_grad():
        assert torch.allclose(m(x), m.unwrap()(x), atol=1e-5)


def test_all_halt_behind_the_first_block() -> None:
    m, x = avit(center=-1e4), images()
    with torch.no_grad():
        logits, info = m(x, return_info="trace")
        first = m.backbone.blocks[0](m.backbone._pos_embed(m.backbone.patch_embed(x)))
        expected = m.backbone.forward_head(m.backbone.norm(first))
    assert torch.allclose(logits, expected, atol=1e-5)
    assert info.tokens[1:] == ((2, 2),) * 3  # the class token, and one row of padding


@pytest.mark.parametrize("schedule", [UNLIMITED, {"name": "constant_r", "r": 9}])
@pytest.mark.parametrize("name", ["plain", "gap"])
def test_the_weights_of_every_token_sum_to_one(name: str, schedule: dict) -> None:
    """With states of one in every channel but the first, answers are sums of weights."""
    m = avit(name, schedule, **MOVING).train()
    for block in m.backbone.blocks:
        block.register_forward_hook(
            lambda _, __, out: torch.cat([out[..., :1], torch.ones_like(out[..., 1:])], -1)
        )
    _, info = m(images(), return_info="trace")
    answer = info.final.memory["answer"][..., 1:]
    assert torch.allclose(answer, torch.ones_like(answer), atol=1e-5)
    spent = info.final.memory["ponder"]
    assert spent.min() < 3 and spent.max() <= 5


def test_removal_is_masking_and_a_batch_of_one_has_no_padding() -> None:
    m, x = avit(**MOVING).train(), images(3)
    with torch.no_grad():
        together, info = m(x, return_info="trace")
        kept = torch.stack([t.mask[:, 1:].sum(1) for t in info.trace[1:3]])
        for i in range(3):
            alone, own = m(x[i : i + 1], return_info="trace")
            assert torch.allclose(alone[0], together[i], atol=2e-5)
            assert [t.n for t in own.trace[1:3]] == kept[:, i].tolist()
    assert len(set(kept[0].tolist())) > 1
    assert info.final.memory["blocks"].max() <= 4


def test_the_schedule_is_an_upper_limit_for_those_closest_to_halting() -> None:
    m = avit(schedule={"name": "per_block", "keep": [None, 10, None, None]}, center=5.0, scale=1.0)
    with torch.no_grad():
        _, free = avit(center=5.0, scale=1.0)(images(), return_info="trace")
        _, info = m(images(), return_info="trace")
    assert [n for _, n in info.tokens] == [65, 11, 11, 11]
    limit = free.trace[1].memory["sum"][:, 1:].sort(dim=1).values[:, 9]
    assert (info.trace[1].memory["sum"][:, 1:] <= limit[:, None] + 1e-6).all()


def test_evaluation_stops_when_the_class_token_has_halted() -> None:
    m, x = avit(**MOVING), images(1)
    with torch.no_grad():
        m.backbone.cls_token[..., 0] += 50.0
        m.backbone.pos_embed[:, 1:, 0] -= 3.0
        logits, info = m(x, return_info="trace")
        other, whole = m.train()(x, return_info="trace")
    assert info.tokens[1] == (2, 2) and whole.tokens[1][0] > 10
    assert torch.allclose(logits, other, atol=1e-5)


@pytest.mark.parametrize("compat", ["none", "official"])
@pytest.mark.parametrize("batch", [1, 3])
def test_losses_are_finite_and_reach_the_first_channel(compat: str, batch: int) -> None:
    m = avit(compat=compat, ponder_weight=1.0, prior_weight=1.0, **MOVING).train()
    logits, info = m(images(batch), return_info="trace")
    targets = torch.arange(batch)
    losses = m.auxiliary_losses(info, logits, targets)
    assert set(losses) == {"ponder", "prior"}
    (F.cross_entropy(logits, targets) + sum(losses.values())).backward()
    grads = [p.grad for p in m.parameters()]
    assert all(g is not None and g.isfinite().all() for g in grads)
    assert m.backbone.blocks[0].mlp.fc2.weight.grad[0].abs().max() > 0


def test_pondering_less_is_learned() -> None:
    m = avit(ponder_weight=1.0, prior_weight=0.0, scale=3.0, center=6.0).train()
    optimizer, spent = torch.optim.SGD(m.parameters(), lr=0.05), []
    for _ in range(6):
        logits, info = m(images(4), return_info="trace")
        loss = m.auxiliary_losses(info, logits, torch.arange(4))["ponder"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        spent.append(float(loss.detach()))
    assert spent[-1] < spent[0] - 0.05


def test_the_prior_is_a_distribution_unless_asked_otherwise() -> None:
    assert prior_target(6, 4.0).sum() == pytest.approx(1)
    assert prior_target(12, 8.0, "official").sum() == pytest.approx(3.26, abs=0.01)
    target = prior_target(12, 8.0)
    assert int(target.argmax()) == 8
    at_best = prior_divergence(target.clamp(0.01), target)
    assert at_best < prior_divergence(torch.ones(12), target)
    assert at_best.abs() < 0.01


@pytest.mark.parametrize("args", [{"eps": 0.0}, {"scale": 0}, {"compat": "x"}, {"prior_depth": 0}])
def test_bad_arguments_are_named(args: dict[str, object]) -> None:
    with pytest.raises(ZooError, match=next(iter(args))):
        avit(**args)
