"""TRG: relations among tokens of a reduced student, and of a dense teacher."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

import zoo
from reduction.mixins.training import Outcome
from reduction.tokens import Tokens
from tests.cases import backbone, images
from zoo.errors import ZooError
from zoo.lit.classifier import Classifier
from zoo.lit.relations import TokenRelations, inner, paired

R8 = {"name": "constant_r", "r": 8}


def _outcome(x: Tensor, source: Tensor | None = None, **fields: Any) -> Outcome:
    t = Tokens.start(x, 1, track=True)._replace(**fields)
    if source is not None:
        t = t._replace(source=source)
    return Outcome((), t, torch.zeros(len(x), 3), torch.zeros(len(x)), None)


def test_tokens_are_paired_through_the_source_map() -> None:
    whole = torch.arange(10.0).reshape(1, 5, 2)  # one prefix token, four patches
    left = torch.randn(1, 4, 2)
    # Patches 0 and 2 are token 1, patch 1 is token 0, patch 3 was dropped; token 2 is empty.
    pairs = paired(_outcome(left, torch.tensor([[1, 0, 1, -1]])), _outcome(whole))
    assert pairs.real.tolist() == [[True, True, False]]
    assert torch.equal(pairs.teacher[0, 0], whole[0, 2])
    assert torch.equal(pairs.teacher[0, 1], (whole[0, 1] + whole[0, 3]) / 2)
    assert torch.equal(pairs.student, left[:, 1:])


def test_padding_and_masked_tokens_take_no_part() -> None:
    x = torch.randn(1, 5, 2)
    mask = torch.tensor([[True, True, False, True, True]])
    policy = torch.tensor([[1.0, 1.0, 1.0, 0.0, 1.0]])
    pairs = paired(_outcome(x, mask=mask, policy=policy), _outcome(x))
    assert pairs.real.tolist() == [[True, False, False, True]]
    # Neither do they change what is compared among the others.
    other = pairs._replace(student=pairs.student.clone())
    other.student[:, 1:3] = 99.0
    assert torch.equal(inner(pairs), inner(other))


def test_a_model_is_like_itself() -> None:
    model = zoo.wrap(backbone("plain"), None).eval()
    loss = TokenRelations()
    loss.fit(model, model)
    with torch.no_grad():
        logits, info = model(images(), return_info=True)
        own = model.outcome(info, logits, torch.zeros(2))
        found = loss.relations(own, own, 0.0)
        assert {name: round(float(v), 6) for name, v in found.items() if name != "global"} == {
            "inner": 0,
            "local": 0,
            "logits": 0,
        }
        # Every token is most like itself, the more surely the lower the temperature.
        assert loss.relations(own, own, 1.0)["global"] < found["global"] < math.log(128)


def test_the_formulas_on_three_tokens() -> None:
    loss = TokenRelations(neighbours=1, sigma=0.5, inner_weight=0, global_weight=0, logit_weight=0)
    s = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
    # Nearest of each by distance: 0 - 1 (0.4), 1 - 0 (0.4), 2 - 1 (0.8).
    graph = loss._graph(s)
    want = torch.tensor([[0, 0.4, 0], [0.4, 0, 0], [0, 0.8, 0]])
    assert torch.allclose(graph, torch.where(want > 0, torch.exp(-want), 0.0), atol=1e-6)
    t = s.flip(0)
    p, q = graph.softmax(-1), loss._graph(t).softmax(-1)
    assert torch.allclose(loss._local(s, t), (p * (p.log() - q.log())).sum(), atol=1e-6)
    loss.order = "teacher"
    assert torch.allclose(loss._local(s, t), (q * (q.log() - p.log())).sum(), atol=1e-6)


@pytest.mark.parametrize("reducer", ["tome", "topk", "dynamicvit"])
def test_a_step_trains_the_student_and_the_projection_only(reducer: str) -> None:
    schedule = R8 if reducer == "tome" else {"name": "keep_rate", "rate": 0.5, "blocks": [1]}
    student = zoo.wrap(backbone("plain"), reducer, schedule).train()
    teacher = zoo.wrap(backbone("plain", seed=3, embed_dim=24), None)
    module = Classifier(student, loss=TokenRelations(), teacher=teacher)
    assert module.loss.projection.weight.shape == (24, 48)

    class Trainer:
        estimated_stepping_batches, global_step = 10, 5

    module._trainer = Trainer()
    module._fabric = None
    module.log = lambda *a, **k: None  # type: ignore[method-assign]
    step = module.training_step((images(4), torch.tensor([0, 1, 2, 3])), 0)
    step.backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(bool(p.grad.isfinite().all()) for p in student.parameters() if p.grad is not None)
    assert float(module.loss.projection.weight.grad.abs().sum()) > 0
    # Not a part of what is saved.
    assert not any("teacher" in name or "related" in name for name in module.state_dict())


@pytest.mark.parametrize(
    ("teacher", "options", "says"),
    [
        ({"img_size": 16}, {}, "expected 8x8 patches of 32x32 pixels in 3 channels"),
        ({"num_classes": 5}, {}, "type loss.logit_weight=0"),
    ],
)
def test_teachers_that_cannot_be_compared_with(
    teacher: dict[str, Any], options: dict[str, Any], says: str
) -> None:
    student = zoo.wrap(backbone("plain"), "tome", R8)
    with pytest.raises(ZooError, match=says):
        TokenRelations(**options).fit(student, zoo.wrap(backbone("plain", **teacher), None))


def test_backbones_and_trainings_without_tokens_to_compare() -> None:
    with pytest.raises(ZooError, match="LookupViT, runs itself"):
        Classifier(zoo.create_model("lookupvit_digits"), loss=TokenRelations())
    from zoo.lit.tocom import TokenCompensation

    student = zoo.wrap(backbone("plain"), "tome", R8, ["tocom"])
    with pytest.raises(ZooError, match="loss=trg goes with module=classifier"):
        TokenCompensation(student, loss=TokenRelations())


def test_a_model_from_scratch_is_no_teacher() -> None:
    from zoo.run.teacher import teacher_of

    cfg = OmegaConf.create({"backbone": {"name": "test_vit", "pretrained": False}})

    class Data:
        config = {"mean": [0.5], "std": [0.5]}

    with pytest.raises(ZooError, match="type loss.teacher=NAME"):
        teacher_of(cfg, None, Data())  # type: ignore[arg-type]
    # Nor is one that was made for other pixels.
    with pytest.raises(ZooError, match=r"type data.mean=\[0.306\]"):
        teacher_of(cfg, "vit_digits", Data())  # type: ignore[arg-type]
    Data.config = {"mean": [0.306], "std": [0.319]}
    assert teacher_of(cfg, "vit_digits", Data()).reducer is None  # type: ignore[arg-type, union-attr]


@pytest.mark.parametrize("bad", [{"order": "both"}, {"temperature": [0.1]}, {"tokens": 1}])
def test_wrong_options(bad: dict[str, Any]) -> None:
    with pytest.raises(ZooError, match=f"loss.{next(iter(bad))}"):
        TokenRelations(**bad)
