"""Models from their parts: names, mappings, instances, and budgets that are solved first."""

from __future__ import annotations

import pytest

import zoo
from reduction import TargetGmacs, UnknownName, ZooError
from tests.cases import backbone
from zoo.budget.solve import solve
from zoo.model.anatomy import Anatomy
from zoo.model.reduced import ReducedViT
from zoo.published import list_published


@pytest.mark.parametrize(
    "schedule", ["diffrate/deit_small_2.9", {"name": "diffrate/deit_small_2.9"}]
)
def test_a_published_schedule_has_a_name_in_python_too(schedule) -> None:
    model = zoo.create_model("deit_small_patch16_224", reducer="diffrate", schedule=schedule)
    assert zoo.profile(model).gmacs == pytest.approx(2.9096, abs=1e-3)
    # What is saved is the counts, which need no file.
    assert model.recipe["schedule"]["name"] == "per_block"


def test_every_published_schedule_can_be_named() -> None:
    names = list_published()
    assert len(names) >= 28 and "diffrate/deit_small_2.9" in names


def test_an_unknown_published_schedule_names_the_nearest() -> None:
    with pytest.raises(UnknownName, match=r"did you mean 'diffrate/deit_small_2.9'"):
        zoo.create_model("test_vit", reducer="diffrate", schedule="diffrate/deit_smal_2.9")


def test_a_schedule_has_a_name_without_a_mapping() -> None:
    model = zoo.wrap(backbone("plain"), "tome", "target_gmacs")
    assert model.target == TargetGmacs() and model.schedule is not None


def test_a_target_is_solved_before_there_is_a_model() -> None:
    m = backbone("plain")
    with pytest.raises(ZooError, match="solved before a model is built"):
        ReducedViT(m, zoo.wrap(m, "tome").reducer, TargetGmacs(fraction=0.6))
    reducer = zoo.wrap(m, "tome").reducer
    schedule = solve(TargetGmacs(fraction=0.6), Anatomy(m, reducer))
    assert schedule == zoo.wrap(m, "tome", {"name": "target_gmacs", "fraction": 0.6}).schedule
    with pytest.raises(ZooError, match="needs a reducer"):
        solve(TargetGmacs(), Anatomy(m))
