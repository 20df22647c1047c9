"""DynamicViT's losses take all four weights of the official code."""

from __future__ import annotations

import pytest
import torch

import reduction
import zoo
from reduction.mixins.training import Outcome, Trains
from tests.cases import backbone, images
from zoo.lit.classifier import Classifier

SCHEDULE = {"name": "keep_rate", "rate": 0.7, "blocks": [1, 2]}
WEIGHTS = {"ratio_weight": "ratio", "logit_weight": "logits", "token_weight": "token"}


def _losses(**weights: float) -> dict[str, float]:
    torch.manual_seed(0)
    model = zoo.wrap(backbone("plain"), {"name": "dynamicvit", **weights}, SCHEDULE).train()
    teacher = zoo.wrap(backbone("plain", seed=1), None).eval()
    torch.manual_seed(1)  # of the draws
    labels = torch.tensor([0, 1])
    logits, info = model(images(), return_info="trace")
    with torch.no_grad():
        dense_logits, dense = teacher(images(), return_info="trace")
        taught: Outcome = teacher.outcome(dense, dense_logits, labels)
    found = model.auxiliary_losses(info, logits, labels, taught)
    return {name: float(value.detach()) for name, value in found.items()}


@pytest.mark.parametrize("weight", WEIGHTS)
def test_each_weight_is_a_factor_of_its_own_loss(weight: str) -> None:
    plain, tripled = _losses(), _losses(**{weight: 3 * _default(weight)})
    for name, value in plain.items():
        factor = 3 if name == WEIGHTS[weight] else 1
        assert tripled[name] == pytest.approx(factor * value, rel=1e-5)
    assert min(plain.values()) > 0


def _default(weight: str) -> float:
    return float(getattr(reduction.create("dynamicvit"), weight))


def test_the_defaults_are_the_official_ones() -> None:
    assert [_default(w) for w in ("class_weight", *WEIGHTS)] == [1.0, 2.0, 0.5, 0.5]


@pytest.mark.parametrize("name", ["dynamicvit", "dtps"])
def test_the_fourth_weight_is_that_of_the_classification(name: str) -> None:
    totals = []
    for weight in (1.0, 0.25):
        reducer = {"name": name, "class_weight": weight}
        model = zoo.wrap(backbone("plain"), reducer, SCHEDULE)
        model.train()
        assert isinstance(model.reducer, Trains) and model.reducer.class_weight == weight
        assert model.recipe["reducer"]["class_weight"] == weight
        module = Classifier(model, aux_weight=0.0)
        module.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
        torch.manual_seed(1)
        totals.append(float(module.training_step((images(), torch.tensor([0, 1])), 0).detach()))
    assert totals[1] == pytest.approx(totals[0] / 4, rel=1e-5)
