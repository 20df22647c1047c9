"""Evo-ViT: nothing is lost, and what is parked waits unchanged."""

from __future__ import annotations

import pytest
import torch

import zoo
from reduction.errors import ZooError
from tests.cases import backbone, images

STAGES = {"name": "per_block", "keep": [None, 20, None, 30]}


def evovit(
    name: str = "mae", schedule: dict | None = None, **args: object
) -> zoo.model.reduced.ReducedViT:
    return zoo.wrap(backbone(name), {"name": "evovit", **args}, schedule or STAGES).eval()


def test_counts_of_stages_and_layers() -> None:
    plan = evovit().plan()
    assert [p.attention for p in plan] == [65, 22, 22, 32]
    assert [(p.entering, p.leaving) for p in plan] == [(65, 65), (65, 22), (22, 65), (65, 65)]
    assert [p.attention for p in evovit(mode="layer", fast="park").plan()] == [65, 21, 21, 31]
    assert [p.leaving for p in evovit(mode="layer").plan()] == [65] * 4
    # The class row is computed where a later choice hangs on it.
    assert [bool(p.need) for p in plan] == [True, True, True, False]


@pytest.mark.parametrize("mode", ["stage", "layer"])
@pytest.mark.parametrize("fast", ["update", "park"])
def test_keeping_all_is_the_dense_model(mode: str, fast: str) -> None:
    m, x = evovit(schedule={"name": "keep_rate", "rate": 1.0}, mode=mode, fast=fast), images()
    with torch.no_grad():
        assert torch.equal(m(x), m.unwrap()(x))


def test_every_patch_is_back_in_its_place() -> None:
    with torch.no_grad():
        _, info = evovit()(images(), return_info="trace")
    stage, final = info.trace[1], info.final
    assert torch.equal(final.source, torch.arange(64).expand(2, -1))
    assert final.unit and (final.size == 1).all() and final.n == 64
    # Meanwhile one token stands for those that wait, and counts for all of them.
    assert stage.size[:, -1].eq(44).all() and ((stage.source == 20).sum(1) == 44).all()


def test_parked_tokens_wait_unchanged() -> None:
    with torch.no_grad():
        _, info = evovit(fast="park")(images(), return_info="trace")
    before, stage, after = info.trace[0], info.trace[1], info.trace[2]
    rest, slow = stage.memory["rest"], stage.memory["slow"]
    take = lambda t, i: t.patches.gather(1, i.unsqueeze(-1).expand(-1, -1, 48))  # noqa: E731
    assert torch.equal(take(before, rest), take(after, rest))
    assert not torch.isclose(take(before, slow), take(after, slow)).all(-1).any()
    # The next choice is among all patches, those that waited included.
    second = info.trace[3].memory["chosen"]
    assert (second.unsqueeze(2) == rest.unsqueeze(1)).any()


def test_the_fast_path_adds_what_happened_to_the_token_that_stands_for_the_others() -> None:
    with torch.no_grad():
        _, info = evovit()(images(), return_info="trace")
    before, stage, after = info.trace[0], info.trace[1], info.trace[2]
    rest = stage.memory["rest"].unsqueeze(-1).expand(-1, -1, 48)
    moved = after.patches.gather(1, rest) - before.patches.gather(1, rest)
    assert torch.allclose(moved, moved[:, :1].expand_as(moved), atol=1e-5)
    assert moved.abs().max() > 0.01


@pytest.mark.parametrize("name", ["mae", "plain"])
def test_the_second_classifier_reads_what_the_first_does_not(name: str) -> None:
    m = evovit(name)
    _, info = m(images(), return_info="trace")
    t = info.trace[-1]
    x = t.x[:, 0] if name == "mae" else t.patches.mean(1)
    expected = m.reducer.head(m.reducer.norm(x))
    assert torch.equal(m.reducer.second_logits(t), expected)
    m.reset_classifier(3)
    logits, info = m(images(), return_info="trace")
    losses = m.auxiliary_losses(info, logits, torch.tensor([2, 0]))
    assert losses["second"] > 0 and m.reducer.head.out_features == 3


@pytest.mark.parametrize(
    "args",
    [{"mode": "x"}, {"fast": "x"}, {"tradeoff": 0.0}, {"tradeoff": [0.5]}, {"head_weight": -1}],
)
def test_bad_arguments_are_named(args: dict[str, object]) -> None:
    with pytest.raises(ZooError, match=next(iter(args))):
        evovit(**args)
