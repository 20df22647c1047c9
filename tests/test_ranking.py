"""Ranking methods: every score with every way of settling, and scores chosen by name."""

from __future__ import annotations

import inspect

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

import reduction
import zoo
from reduction import ScoreReducer, Signals, Step, Tokens, ZooError
from reduction.counts import Budget
from reduction.functional.lots import draw, lots
from reduction.functional.scores import SCORES, Draw
from reduction.methods.ranked import SETTLES
from reduction.registry import method
from tests.cases import backbone, images
from zoo.cost.counters import fvcore_gmacs
from zoo.run.build import build_model
from zoo.run.messages import config_folder

RATE = {"name": "keep_rate", "rate": 0.6}
RANKING = [name for name in reduction.list_methods() if issubclass(method(name), ScoreReducer)]
BY_NAME = [n for n in RANKING if "score" in inspect.signature(method(n)).parameters]


def model(reducer, name="plain"):
    return zoo.wrap(backbone(name), reducer, RATE).eval()


@torch.no_grad()
def answer(reducer, name="plain"):
    return model(reducer, name)(images(3))


def named(method_, score, **args):
    return {"name": method_, "score": score, **({"seed": 3} if score == "random" else {}), **args}


@pytest.mark.parametrize("settle", SETTLES)
@pytest.mark.parametrize("score", SCORES)
def test_every_score_goes_with_every_way_of_settling(score: str, settle: str) -> None:
    m, x = model(named("ranked", score, settle=settle)), images(3)
    with torch.no_grad():
        logits, info = m(x, return_info="trace")
    assert logits.isfinite().all()
    assert list(info.tokens) == m.token_counts()
    kept = info.tokens[1][1] - 1
    assert kept == 38 + (settle == "fuse")
    # Only what is dropped is lost from the sizes.
    total = info.trace[-1].patch_size.sum(1)
    assert (total < 64).all() if settle == "drop" else torch.allclose(total, torch.tensor(64.0))
    assert (info.source >= 0).all() == (settle != "drop")
    assert fvcore_gmacs(m, x[:2]) == pytest.approx(zoo.profile(m).gmacs, rel=1e-5)
    m.train()(x).sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in m.parameters())


@pytest.mark.parametrize("score", SCORES)
def test_ranked_is_the_methods_taken_apart(score: str) -> None:
    pairs = [("topk", {}, "drop"), ("evit", {}, "fuse"), ("etps", {}, "squeeze")]
    for name, args, settle in [*pairs, ("evit", {"fuse": False}, "drop")]:
        whole = answer(named("ranked", score, settle=settle))
        assert torch.equal(answer(named(name, score, **args)), whole), name


def test_scores_named_as_before_are_those_of_score_from() -> None:
    for name in BY_NAME:
        if "score_from" not in inspect.signature(method(name)).parameters:
            continue
        for new, old in (("class", "class"), ("column", "column_mean")):
            by_name, before = {"name": name, "score": new}, {"name": name, "score_from": old}
            assert torch.equal(answer(by_name), answer(before)), name


def test_at_least_ten_methods_rank() -> None:
    assert len(RANKING) >= 10 and len(BY_NAME) >= 10


@pytest.mark.parametrize("name", BY_NAME)
def test_every_ranking_method_takes_every_score(name: str) -> None:
    for score in SCORES:
        assert answer(named(name, score)).isfinite().all(), score
    for score in ("column", "norm", "random"):
        assert answer(named(name, score), "gap").isfinite().all(), score
    with pytest.raises(ZooError, match="class token"):
        answer(named(name, "inverse"), "gap")


@pytest.mark.parametrize("name", BY_NAME)
def test_a_score_is_in_the_recipe_only_where_one_was_chosen(name: str) -> None:
    plain = reduction.create(name).config()
    if name != "ranked":
        assert not {"score", "seed"} & set(plain)
        assert "score" not in repr(reduction.create(name)).replace("score_from", "")
    chosen = reduction.create(name, score="norm")
    assert chosen.config()["score"] == "norm" and "seed" not in chosen.config()
    torch.manual_seed(11)
    drawn = reduction.create(name, score="random")
    assert drawn.config()["seed"] == 11
    again = reduction.create_reducer(drawn.config())
    assert again is not None and again.config() == drawn.config()


def test_a_random_score_draws_for_every_image_and_seed() -> None:
    x = images(4)
    m = model({"name": "topk", "score": "random", "seed": 1})
    with torch.no_grad():
        source = m(x, return_info=True)[1].source
        alone = torch.cat([m(image[None], return_info=True)[1].source for image in x])
        other = model({"name": "topk", "score": "random", "seed": 2})
        assert torch.equal(source >= 0, alone >= 0)
        assert ((source >= 0) != (other(x, return_info=True)[1].source >= 0)).any(1).all()
    assert (source >= 0).unique(dim=0).shape[0] == 4
    # At the first step, the tokens that `reducer=random` draws.
    once = {"name": "keep_rate", "rate": 0.5, "blocks": [1]}
    kept = [
        zoo.wrap(backbone("plain"), r, once).eval()(x, return_info=True)[1].source >= 0
        for r in ({"name": "random", "seed": 1}, {"name": "topk", "score": "random", "seed": 1})
    ]
    assert torch.equal(*kept)


def test_scores_are_shares_in_every_type() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        t = Tokens.start(torch.randn(2, 9, 6).to(dtype) * 1e3, prefix=1)
        row = torch.randn(2, 3, 9).softmax(-1).to(dtype)
        s = Signals(cls_row=row, column=row.mean(1), x_mid=t.x, mlp=torch.randn_like(t.x))
        for name, score in SCORES.items():
            value = score.function(t, s, Draw(seed=2))
            assert value.shape == (2, 8) and (value >= 0).all(), name
            assert (value.float().sum(1) <= 1.01).all(), name
    order = SCORES["random"].function(t, s, Draw(seed=2, block=1)).topk(3).indices.sort(1).values
    assert torch.equal(order, draw(lots(t.x), 8, 3, 2, 1))
    high = SCORES["class"].function(t, s, Draw()).argmax(1)
    low = SCORES["inverse"].function(t, s, Draw())
    assert torch.equal(low.gather(1, high[:, None])[:, 0], low.amin(1))


def test_what_makes_no_sense_is_refused_in_one_line() -> None:
    for name, args, says in [
        ("ranked", {"score": "attention"}, "score must be one of"),
        ("ranked", {"settle": "merge"}, "settle must be one of"),
        ("ranked", {"temperature": 0.5}, "belongs to settle='squeeze'"),
        ("ranked", {"settle": "squeeze", "temperature": 0}, "temperature must be positive"),
        ("ranked", {"seed": 3}, "belongs to score='random'"),
        ("evit", {"seed": 3, "score": "norm"}, "belongs to score='random'"),
        ("evit", {"score": "random", "seed": 1.5}, "seed must be a whole number"),
        ("evit", {"score": "norm", "score_from": "column_mean"}, "either score or score_from"),
        ("evit", {"score_from": "norm"}, "score_from must be one of"),
    ]:
        with pytest.raises(ZooError, match=says) as refused:
            reduction.create(name, **args)
        assert "\n" not in str(refused.value)


def test_a_method_from_outside_settles_as_it_likes() -> None:
    class Halves(ScoreReducer):
        """Keep the first tokens, and fold each later one into the first."""

        card = reduction.card("topk")
        needs = frozenset()

        def score(self, t, s, step):
            return -torch.arange(t.n, dtype=torch.float32).expand(t.x.shape[0], -1)

        def order(self, t, score, step):
            return score.argsort(dim=1, descending=True)

        def settle(self, t, kept, rest, score, step):
            return reduction.Merge(None, kept, pairs=(rest, torch.zeros_like(rest)))

    t = Tokens.start(torch.randn(2, 7, 4), prefix=1)
    out = Halves().reduce(t, Signals(), Step(0, 4, Budget(2), (2, 3)))
    assert out.n == 2 and torch.equal(out.patches[:, 1], t.patches[:, 1])
    mean = t.patches[:, [0, 2, 3, 4, 5]].mean(1)
    assert torch.allclose(out.patches[:, 0], mean, atol=1e-6)
    assert Halves().config()["name"].endswith("Halves") and Halves().needs == frozenset()


def test_scores_are_chosen_on_the_command_line() -> None:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        words = ["backbone=test_vit", "reducer=evit", "reducer.score=random", "reducer.seed=4"]
        chosen = build_model(compose("eval", words)).reducer
        ranked = ["reducer=ranked", "reducer.settle=nearest", "reducer.prop_attn=true"]
        merged = build_model(compose("eval", ["backbone=test_vit", *ranked])).reducer
    GlobalHydra.instance().clear()
    assert chosen is not None and chosen.config()["seed"] == 4
    assert merged is not None and merged.prop_attn and merged.config()["settle"] == "nearest"
