"""TokenLearner: what its maps are, and what the fuser does with the patches."""

from __future__ import annotations

import pytest
import torch

import zoo
from tests.cases import backbone, images
from zoo.errors import ZooError
from zoo.model.reduced import ReducedViT

LATE = {"name": "per_block", "keep": [None, None, 6, None]}


def learner(schedule: object = LATE, **args: object) -> ReducedViT:
    m = backbone("plain")
    torch.manual_seed(3)
    return zoo.wrap(m, {"name": "tokenlearner", **args}, schedule).eval()


def test_maps_of_1_1_are_distributions_and_follow_the_patches() -> None:
    maps = learner().reducer.stages[0].maps
    x, order = torch.randn(2, 64, 48), torch.randperm(64)
    with torch.no_grad():
        w = maps(x, (8, 8))
        assert w.shape == (2, 6, 64) and torch.allclose(w.sum(2), torch.ones(2, 6), atol=1e-6)
        assert torch.allclose(maps(x[:, order], (8, 8)), w[:, :, order], atol=1e-6)


def test_maps_of_1_0_see_neighbours_on_the_grid() -> None:
    maps = learner(version="1.0").reducer.stages[0].maps
    x, order = torch.randn(2, 15, 48), torch.randperm(15)
    with torch.no_grad():
        w = maps(x, (3, 5))
        assert not torch.allclose(maps(x[:, order], (3, 5)), w[:, :, order], atol=1e-3)
        # Four convolutions reach four patches far in each direction, along rows of the grid.
        far = torch.randn(1, 64, 48)
        moved = far.clone()
        moved[:, 0] += torch.randn(48)
        change = (maps(far, (8, 8)) - maps(moved, (8, 8))).abs().sum(1).view(8, 8)
        assert (change[:5, :5] > 0).all() and change[5:].sum() == change[:, 5:].sum() == 0
    mean = learner(version="1.0", pooling="mean").reducer.stages[0].maps
    mean.load_state_dict(maps.state_dict())
    assert torch.allclose(mean(x, (3, 5)) * 15, w, atol=1e-6)


def test_one_token_of_1_1_is_attention_pooling() -> None:
    m = learner({"name": "per_block", "keep": [None, None, 1, None]})
    stage, x = m.reducer.stages[0], torch.randn(3, 64, 48)
    with torch.no_grad():
        weight = stage.maps.fc2(stage.maps.act(stage.maps.fc1(stage.maps.norm(x)))).softmax(1)
        assert torch.allclose(
            stage.maps(x, (8, 8)) @ x, (weight * x).sum(1, keepdim=True), atol=1e-5
        )


def test_parameters_are_where_the_schedule_says() -> None:
    assert len(learner().reducer.stages) == 1
    several = {"name": "per_block", "keep": [None, 9, 6, 3]}
    assert len(learner(several).reducer.stages) == 3
    first = learner(several, version="1.0")
    assert len(first.reducer.stages) == 1
    assert first.token_counts() == [(65, 65), (65, 10), (10, 10), (10, 10)]


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_a_new_fuser_leaves_patches_as_they_are(version: str) -> None:
    m, x = learner(version=version, fuser=True), images()
    plan = m.plan()
    assert [p.attention for p in plan] == [65, 65, 7, 7]
    assert len(m.reducer.stages) == 2  # the step lasts to the end
    with torch.no_grad():
        _, info = m(x, return_info="trace")
    for t in info.trace[2:]:
        assert torch.equal(t.x[:, 1:], info.trace[1].x[:, 1:])
        assert torch.equal(t.source, torch.arange(64).expand(2, -1))
    torch.nn.init.normal_(m.reducer.stages[0].fuser.mix.weight)
    with torch.no_grad():
        _, info = m(x, return_info="trace")
    assert not torch.equal(info.trace[2].x[:, 1:], info.trace[1].x[:, 1:])
    assert torch.equal(info.trace[3].x[:, 1:], info.trace[2].x[:, 1:])


def test_the_last_fuser_is_used_where_patches_are_read() -> None:
    def unused(name: str) -> set[str]:
        m = zoo.wrap(backbone(name), {"name": "tokenlearner", "fuser": True}, LATE)
        return {".".join(n.split(".")[:4]) for n in m.unused_parameters()}

    assert unused("plain") == {"reducer.stages.1.fuser"} and unused("gap") == set()


def test_refusals() -> None:
    with pytest.raises(ZooError, match="version must be one of"):
        learner(version="2")
    assert learner(version=1.0).reducer.version == "1.0"
    with pytest.raises(ZooError, match="pooling must be one of"):
        learner(pooling="max")
    with pytest.raises(ZooError, match="bottleneck must be 1 or more"):
        learner(bottleneck=0)
    with pytest.raises(ZooError, match="takes none that a plugin adds"):
        zoo.wrap(backbone("plain"), {"name": "tokenlearner", "fuser": True}, LATE, ["clc"])
