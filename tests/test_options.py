"""What every reducer takes: sizes in the attention or not, and where dropped tokens go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

import reduction
import zoo
from reduction import Budget, Signals, Step, Tokens
from reduction.registry import method
from tests.cases import METHODS, backbone, images
from zoo import checkpoint
from zoo.cost.counters import torch_gmacs
from zoo.errors import ZooError
from zoo.run.build import build_model
from zoo.run.messages import config_folder

NAMES = reduction.list_methods()
DROPPERS = [n for n in NAMES if method(n).drops]
ROWS = {row.name: row for row in METHODS}

IMAGES = torch.randn(2, 3, 160, 160)


def wrapped(name: str, **options: Any) -> zoo.ReducedViT:
    row = ROWS[name]
    args = {k: v for k, v in row.args if k not in ("prop_attn", "settle")}
    torch.manual_seed(0)
    return zoo.wrap(backbone("plain"), {"name": name, **args, **options}, dict(row.schedule)).eval()


@pytest.mark.parametrize("name", NAMES)
def test_every_reducer_takes_prop_attn_and_says_the_papers_by_default(name: str) -> None:
    torch.manual_seed(0)  # of which those follow that draw
    published = reduction.create(name)
    assert reduction.create(name, prop_attn="paper").config() == published.config()
    for value in (True, False):
        made = reduction.create(name, prop_attn=value)
        assert made.prop_attn is value and made.config()["prop_attn"] is value
        assert reduction.create_reducer(made.config()).prop_attn is value
    for wrong in (1, "yes", None):
        with pytest.raises(ZooError, match="prop_attn must be true") as refused:
            reduction.create(name, prop_attn=wrong)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", NAMES)
def test_sizes_in_the_attention_change_exactly_the_models_that_have_sizes(name: str) -> None:
    with torch.no_grad():
        plain, info = wrapped(name, prop_attn=False)(images(2), return_info=True)
        weighed = wrapped(name, prop_attn=True)(images(2))
    assert torch.isfinite(weighed).all()
    if name in DROPPERS:
        assert torch.equal(plain, weighed) and (info.size == 1).all()


@pytest.mark.parametrize("name", ["pitome", "token_pooling", "dpcknn", "tofu", "dtps"])
def test_a_merging_method_without_sizes_gets_them(name: str) -> None:
    with torch.no_grad():
        without = wrapped(name, prop_attn=False)(images(2))
        weighed = wrapped(name, prop_attn=True)(images(2))
        published = wrapped(name)(images(2))
    assert torch.equal(published, without) and not torch.allclose(weighed, without, atol=1e-6)


def hand_on_slowly(x: torch.Tensor, kept: list[int]) -> tuple[list[torch.Tensor], list[int]]:
    """Means and sizes of the kept tokens, one image, every token of size one."""
    groups = {k: [x[k]] for k in kept}
    for i in range(len(x)):
        if i not in groups:
            likes = [float(F.cosine_similarity(x[i], x[k], dim=0)) for k in kept]
            groups[kept[likes.index(max(likes))]].append(x[i])
    return [torch.stack(groups[k]).mean(0) for k in kept], [len(groups[k]) for k in kept]


def test_a_dropped_token_joins_the_kept_one_most_like_it() -> None:
    t = Tokens.start(torch.randn(2, 13, 8), prefix=1, track=True)
    row = torch.rand(2, 1, 13).softmax(-1)
    step = Step(0, 4, Budget(5), (3, 4))
    kept = reduction.create("topk").assign(t, Signals(cls_row=row), step).index
    out = reduction.create("topk", settle="nearest").reduce(t, Signals(cls_row=row), step)
    for b in range(2):
        means, sizes = hand_on_slowly(t.patches[b], kept[b].tolist())
        assert torch.allclose(out.patches[b], torch.stack(means), atol=1e-5)
        assert out.patch_size[b].tolist() == sizes
    assert out.source is not None and (out.source >= 0).all() and not out.unit


@pytest.mark.parametrize("name", DROPPERS)
def test_handing_on_loses_no_patch_and_is_paid_for(name: str) -> None:
    model = wrapped(name, settle="nearest", prop_attn=True)
    dropped = wrapped(name)
    with torch.no_grad():
        _, info = model(images(2), return_info=True)
    patches = model.grid[0] * model.grid[1]
    assert (info.size[:, model.prefix :].sum(1) == patches).all()
    assert (info.source >= 0).all()
    assert zoo.profile(model).gmacs > zoo.profile(dropped).gmacs
    measured = torch_gmacs(model, images(2)) - torch_gmacs(dropped, images(2))
    expected = zoo.profile(model).gmacs - zoo.profile(dropped).gmacs
    assert measured == pytest.approx(expected, rel=1e-4)


def test_what_drops_nothing_has_nothing_to_hand_on() -> None:
    for name in set(NAMES) - set(DROPPERS) - {"ranked"}:
        with pytest.raises(ZooError, match="settle"):
            reduction.create(name, settle="nearest")
    with pytest.raises(ZooError, match="settle must be one of"):
        reduction.create("topk", settle="merge")


def test_the_options_are_saved_with_a_model(tmp_path: Path) -> None:
    made = {"name": "topk", "settle": "nearest", "prop_attn": True}
    model = zoo.create_model("test_vit", reducer=made, schedule={"name": "keep_rate", "rate": 0.5})
    checkpoint.save_pretrained(model, tmp_path / "m")
    again = zoo.load(str(tmp_path / "m")).eval()
    with torch.no_grad():
        assert torch.equal(again(IMAGES), model.eval()(IMAGES))
    assert again.reducer.config() == model.reducer.config()


def test_every_configuration_names_the_options() -> None:
    for name in NAMES:
        found = yaml.safe_load((Path("configs/reducer") / f"{name}.yaml").read_text())
        assert found["prop_attn"] == "paper", name
        assert ("settle" in found) == (name in DROPPERS or name == "ranked"), name
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        words = ["backbone=test_vit", "reducer=topk", "reducer.prop_attn=true"]
        model = build_model(compose("eval", [*words, "reducer.settle=nearest"]))
    GlobalHydra.instance().clear()
    assert model.reducer.prop_attn and model.reducer.hands_on
