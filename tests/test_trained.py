"""The recipes of the trained leaderboard: each composes, and none is run twice."""

from __future__ import annotations

import shlex

import pytest
from hydra import compose, initialize_config_dir

from benchmarks import trained

CONFIGS = str(trained.ROOT / "configs")


@pytest.mark.parametrize("recipe", trained.RECIPES)
def test_recipes_compose(recipe: str) -> None:
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        cfg = compose("train", overrides=shlex.split(recipe), return_hydra_config=False)
    assert cfg.data.name == "fashion_mnist" and cfg.test == "last"


def test_a_recipe_that_has_a_row_is_left_out() -> None:
    first, second, *rest = trained.RECIPES
    rows = [
        {"status": "ok", "command": f"python train.py {first} progress=False results=x.jsonl"},
        {"status": "failed", "command": f"python train.py {second}"},
    ]
    assert trained.missing(rows) == [second, *rest]


def test_recipes_differ() -> None:
    assert len({trained.words(recipe) for recipe in trained.RECIPES}) == len(trained.RECIPES)
