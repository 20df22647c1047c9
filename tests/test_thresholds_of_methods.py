"""Every method of pairs takes thresholds: who does, how, and who says why not."""

from __future__ import annotations

import copy
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import reduction
import zoo
from reduction.mixins.calibrating import Calibrates, TakesThresholds
from tests.cases import backbone, images
from tests.test_calibrate import R8, left
from zoo.checkpoint.folder import save_pretrained
from zoo.errors import ZooError
from zoo.measure.calibrate import calibrate, removed, takers

NEAREST = {"settle": "nearest"}
ROWS: list[tuple[str, dict[str, Any]]] = [
    ("tofu", {}),
    ("tofu", {"switch": -1, "mlerp": "port"}),
    ("dtem", {}),
    ("mctf", {}),
    ("mctf", {"osa": 2, "pooling": "max", "floor": 20}),
    ("mctf", {"osa": 0, "pooling": "size"}),
    ("vidtldr", {}),
    ("ppt", {}),
    ("ppt", {"threshold": 0.0, "prop_attn": False, "score_from": "column_mean"}),
    ("diffrate", {}),
    ("importance_then_similarity", {}),
    ("importance_then_similarity", {"metric": "key", "score_from": "column_mean"}),
    ("ranked", NEAREST),
    ("ranked", {"settle": "squeeze", "temperature": 0.01, "score": "repshift"}),
    ("etps", {}),
    ("atc", {}),
    ("atc", {"linkage": "complete", "mean": "plain"}),
]
IDS = ["-".join([name, *map(str, args.values())]) for name, args in ROWS]


def of(name: str, args: dict[str, Any] | None = None, schedule: Any = R8) -> zoo.ReducedViT:
    return zoo.wrap(backbone("plain"), {"name": name, **(args or {})}, schedule).eval()


def test_the_table_has_every_method_that_takes_thresholds() -> None:
    # These three are held in the tests of calibration itself.
    assert {name for name, _ in ROWS} | {"dtome", "tome", "pitome"} == set(takers())


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "args"),
    [
        pytest.param(*row, id=row_id, marks=() if i % 3 == 0 else pytest.mark.slow)
        for i, (row, row_id) in enumerate(zip(ROWS, IDS, strict=True))
    ],
)
def test_a_method_merges_by_its_thresholds(name: str, args: dict[str, Any]) -> None:
    model, x, others = of(name, args), images(4), images(7)[4:]
    calibrate(model, [x])
    assert model.reducer.name == name and isinstance(model.reducer, Calibrates)
    # Calibration merged the pairs of the schedule over the whole batch; so do its thresholds.
    counts = left(model, x)
    assert counts.sum(1).tolist() == [4 * 56, 4 * 48, 4 * 40, 4 * 32]
    assert len(set(counts[-1].tolist())) > 1
    # Of images that it was not calibrated on: no pair is alike to the last bit.
    together, alone = model(others), torch.cat([model(i[None]) for i in others])
    assert torch.allclose(together, alone, atol=2e-5)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(again(x), model(x))
    built = reduction.create(**model.reducer.config())
    assert type(built) is type(model.reducer) and built.config() == model.reducer.config()
    few = counts.sum()
    calibrate(model, [x], [3] * 4)
    assert left(model, x).sum() > few
    model.reducer.set_thresholds([1.0] * 4)
    dense = zoo.wrap(model.unwrap(), None).eval()
    assert torch.allclose(model(x), dense(x), atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["tofu", "atc", "importance_then_similarity"])
def test_a_limit_is_the_schedules(name: str) -> None:
    args = {"prune_share": 0.0} if name.startswith("imp") else {}
    model, x = of(name, {**args, "thresholds": "limit"}), images(2)
    # Nothing is calibrated yet: the most similar pairs merge until the schedule is met.
    assert left(model, x).tolist() == [[n, n] for n in (56, 48, 40, 32)]
    model.reducer.set_thresholds([0.3] * 4)
    model.reducer.limit = True
    assert (left(model, x)[0] < 56).all()
    assert model.reducer.config()["thresholds"] == "limit"


@torch.no_grad()
def test_the_count_of_one_image_is_that_of_its_thresholds() -> None:
    # One image alone: thresholds bring back the counts, and the method what it is with counts.
    for name, args in (("tofu", {}), ("dtem", {}), ("vidtldr", {}), ("atc", {}), ("ppt", {})):
        model, x = of(name, args), images(1)
        want = model(x)
        calibrate(model, [x])
        assert torch.allclose(model(x), want, atol=2e-5), name


@torch.no_grad()
def test_a_learned_embedding_is_kept_and_saved(tmp_path: Path) -> None:
    schedule = {"name": "keep_rate", "rate": 0.7, "blocks": [3, 6]}
    model = zoo.create_model("test_vit", reducer="dtem", schedule={**schedule, "blocks": [2, 4]})
    x = torch.randn(3, 3, 160, 160)
    before = {k: v.clone() for k, v in model.reducer.state_dict().items()}
    calibrate(model.eval(), [x])
    after = model.reducer.state_dict()
    assert before and all(torch.equal(after[k], v) for k, v in before.items())
    assert set(after) - set(before) == {"thresholds", "pairs"}
    save_pretrained(model, tmp_path / "m")
    again = zoo.load(str(tmp_path / "m")).eval()
    assert again.reducer.config() == model.reducer.config()
    assert torch.equal(again(x), model(x))
    with pytest.raises(ZooError, match="has embeddings for blocks"):
        calibrate(again, [x], [3] * again.depth)
    # The method with counts is loaded from the same weights.
    assert not isinstance(zoo.load(str(tmp_path / "m"), reducer="dtem").reducer, Calibrates)


def test_thresholds_merge_in_training_as_in_evaluation() -> None:
    for name in ("dtem", "mctf", "diffrate"):
        model, x = of(name), images(3)
        calibrate(model, [x])
        want = model(x)
        out = model.train()(x)
        assert torch.allclose(out, want, atol=2e-5), name
        out.sum().backward()
        learned = dict(model.reducer.named_parameters())
        assert model.reducer.unused() == set(learned)
        assert all(p.grad is None for p in learned.values())


@torch.no_grad()
def test_calibrating_once_more_asks_the_schedule_again() -> None:
    for name in ("tofu", "dtome"):
        model, x = of(name), images(2)
        first = calibrate(model, [x])
        assert removed(model) == [8] * 4 and not model.reducer.limit
        assert calibrate(model, [x]) == first


def test_arguments_of_counts_are_refused_with_what_to_type() -> None:
    for name, args, says in [
        ("ranked", {}, "type reducer.settle=nearest, or reducer.settle=squeeze"),
        ("ranked", {**NEAREST, "score": "random"}, "type score='class'"),
        ("ppt", {"score": "random"}, "type score='class'"),
        ("diffrate", {"prune_share": 0.5}, "type reducer.prune_share=0.0"),
        ("importance_then_similarity", {}, "type reducer.prune_share=0.0"),
        ("diffrate", {"search": {"granularity": 1}}, "type search=null"),
    ]:
        with pytest.raises(ZooError, match=re.escape(says)) as error:
            reduction.create(name, **args, thresholds=True)
        assert "\n" not in str(error.value)
    with pytest.raises(ZooError, match="thresholds must be true"):
        reduction.create("tofu", thresholds="maybe")
    assert not isinstance(reduction.create("tofu", thresholds=False), Calibrates)
    # What calibration changes by itself, it writes down.
    form = reduction.create("importance_then_similarity").thresholded()
    assert form.config()["prune_share"] == 0.0 and form.config()["thresholds"] is True


@torch.no_grad()
def test_clusters_that_join_one_by_one_are_no_graph() -> None:
    model, x = of("atc"), images(2)
    calibrate(model, [x])
    with pytest.raises(Exception, match="no graph to compile or export"):
        torch.export.export(model, (x,))


MERGING = [
    name
    for name in reduction.list_methods()
    if any(word in reduction.card(name).kind for word in ("merge", "cluster", "pool"))
]


@pytest.mark.parametrize("name", MERGING)
def test_every_merging_method_takes_thresholds_or_says_why_not(name: str) -> None:
    made = reduction.create(name)
    if isinstance(made, Calibrates | TakesThresholds):
        return
    from zoo.measure.calibrate import thresholded

    with pytest.raises(ZooError, match=rf"{name}.*no thresholds to calibrate: \w+") as error:
        thresholded(made)
    assert "\n" not in str(error.value) and "reducer='dtome'" in str(error.value)
    own = {"algm": "of its own", "g2tm": "of its own", "ltm": "learned", "ltmp": "learned"}
    fixed = {"cubistmerge": "rectangular", "toma": "mixture", "token_pooling": "many clusters"}
    assert {**own, **fixed}.get(name, "") in str(error.value)


def test_the_page_lists_those_that_take_thresholds() -> None:
    page = Path("docs/thresholds.md").read_text()
    assert set(re.findall(r"^\| \[`(\w+)`\]", page, re.M)) == set(takers())
