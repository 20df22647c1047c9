"""TCA: counts of both rules, groups against plain loops, and what an anchor does."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor

import zoo
from reduction import Budget, Signals, Step, Tokens, create
from reduction.functional.carriers import append
from tests.cases import backbone, images
from zoo.adapters.hollow import hollow
from zoo.cost.counters import fvcore_gmacs
from zoo.errors import ZooError

NINTHS = {"name": "keep_rate", "rounding": "ceil", "of": "current", "blocks": [3, 6, 9]}


def deit(rate: float, **args: object) -> object:
    with hollow():
        m = timm.create_model("vit_base_patch16_clip_224")
    return zoo.profile(zoo.wrap(m, {"name": "tca", **args}, {**NINTHS, "rate": rate}))


def test_counts_of_the_release_and_counts_that_give_the_published_costs() -> None:
    release = deit(0.9, counting="release")
    assert [release.tokens[b][1] for b in (3, 6, 9)] == [143, 104, 77]
    total = deit(0.9)
    assert [total.tokens[b][1] for b in (3, 6, 9)] == [179, 163, 148]
    assert round(release.gmacs, 1) == 11.9 and round(total.gmacs, 1) == 15.4
    assert round(deit(0.7).gmacs, 1) == 11.6
    with pytest.raises(ZooError, match="can remove at most"):
        deit(0.6, counting="release")


def slow(x: Tensor, score: Tensor, whole: int, members: int, groups: int) -> list[Tensor]:
    """Tokens of one image, by loops."""
    order = score.argsort(descending=True).tolist()
    body, last = order[whole : whole + members], order[whole + members :]
    centers = [body[0]]
    while len(centers) < groups:
        gap = {i: min((x[i] - x[c]).norm().item() for c in centers) for i in body}
        centers.append(max(body, key=lambda i: gap[i]))
    rows = [x[i] for i in order[:whole]]
    for c in centers:
        mine = [i for i in body if min(centers, key=lambda d: (x[i] - x[d]).norm().item()) == c]
        w = {i: 1.0 if i == c else 1 / (x[i] - x[c]).norm().item() for i in mine}
        rows.append(sum(w[i] * x[i] for i in mine) / sum(w.values()))
    return [*rows, sum(score[i] * x[i] for i in last)]


@pytest.mark.parametrize("counting", ["total", "release"])
def test_rows_are_those_of_plain_loops(counting: str) -> None:
    g = torch.Generator().manual_seed(0)
    t = Tokens.start(torch.randn(3, 41, 16, generator=g), 1, track=True)
    row = torch.rand(3, 2, 41, generator=g).softmax(-1)
    reducer, step = create("tca", counting=counting), Step(1, 4, Budget(32), (8, 5))
    out = reducer.reduce(t, Signals(cls_row=row), step)
    score = row.mean(1)[:, 1:]
    shares = {"total": (28, 8, 4), "release": (14, 18, 4)}[counting]
    for b in range(3):
        expected = torch.stack(slow(t.patches[b], score[b], *shares))
        assert torch.allclose(out.patches[b], expected, atol=1e-5)
    # Every patch is somewhere, and sizes say so.
    assert (out.source >= 0).all() and torch.equal(out.size.sum(1), torch.full((3,), 41.0))
    assert out.n == reducer.count(40, step)


def test_identical_tokens_leave_no_group_empty() -> None:
    t = Tokens.start(torch.ones(1, 21, 8), 1, track=True)
    step = Step(1, 4, Budget(12), (4, 5))
    out = create("tca").reduce(t, Signals(cls_row=torch.full((1, 2, 21), 1 / 21)), step)
    assert out.n == 13 and (out.size > 0).all()
    assert torch.allclose(out.patches[:, :12], torch.ones(1, 12, 8))


def anchored() -> zoo.ReducedViT:
    schedule = {"name": "keep_rate", "rate": 0.8, "blocks": [2]}
    m = zoo.wrap(backbone("plain"), {"name": "tca", "anchors": 3}, schedule).eval()
    m.reducer.set_anchors(torch.randn(3, 4, 48, generator=torch.Generator().manual_seed(5)))
    return m


def test_the_anchor_joins_one_attention_and_leaves() -> None:
    m, x = anchored(), images(3)
    with torch.no_grad():
        _, info = m(x, return_info="trace")
        before, after = info.trace[1], info.trace[2]
        anchors = m.reducer.anchor_tokens[:, 1]
        near = torch.cosine_similarity(before.x[:, :1], anchors, dim=-1).argmax(1)
        block = m.backbone.blocks[2]
        joined = append(before, anchors[near].unsqueeze(1))
        cls = (joined.x + block.attn(block.norm1(joined.x)))[:, :1]
        cls = cls + block.mlp(block.norm2(cls))
    assert torch.allclose(cls[:, 0], after.x[:, 0], atol=1e-5)
    assert after.n == 52 and list(info.tokens) == m.token_counts()


def test_only_the_nearest_anchor_of_the_previous_block_counts() -> None:
    m, x = anchored(), images(1)
    with torch.no_grad():
        expected, info = m(x, return_info="trace")
        cls = info.trace[1].x[:, :1]
        best = int(torch.cosine_similarity(cls, m.reducer.anchor_tokens[:, 1], dim=-1).argmax())
        for i in range(3):
            for block in range(4):
                if (i, block) != (best, 1):
                    m.reducer.anchor_tokens[i, block] = -cls[0, 0]
        assert torch.equal(m(x), expected)
        m.reducer.anchor_tokens[best, 1] += 1.0
        assert not torch.equal(m(x), expected)


def test_anchors_are_saved_and_checked() -> None:
    m = anchored()
    assert "reducer.anchor_tokens" in m.state_dict()
    again = anchored()
    torch.nn.init.zeros_(again.reducer.anchor_tokens)
    again.load_state_dict(m.state_dict())
    with torch.no_grad():
        assert torch.equal(again(images()), m(images()))
    with pytest.raises(ZooError, match=r"expected anchors of shape \(3, 4, 48\)"):
        m.reducer.set_anchors(torch.zeros(2, 4, 48))
    with pytest.raises(ZooError, match="None"):
        create("tca").set_anchors(torch.zeros(2, 4, 48))


def test_the_release_rule_runs_counts_and_solves_like_the_other() -> None:
    args = {"name": "tca", "counting": "release", "anchors": 2}
    m = zoo.wrap(backbone("plain"), args, {"name": "target_gmacs", "fraction": 0.7}).eval()
    cost = zoo.profile(m)
    assert 0.58 * cost.dense < cost.gmacs <= 0.7 * cost.dense
    counts = {"name": "per_block", "keep": [None, 51, None, 20]}
    m = zoo.wrap(m.unwrap(), args, counts).eval()
    m.reducer.set_anchors(torch.randn(2, 4, 48, generator=torch.Generator().manual_seed(5)))
    assert fvcore_gmacs(m, images(2)) == pytest.approx(zoo.profile(m).gmacs, rel=1e-5)
    with torch.no_grad():
        logits, info = m(images(3), return_info=True)
        alone = torch.cat([m(x[None]) for x in images(3)])
    assert list(info.tokens) == m.token_counts() and torch.allclose(logits, alone, atol=2e-5)
    for n in range(1, 70):
        limit = n - m.reducer.max_drop(n)
        if limit == n:
            continue
        whole, members, groups = m.reducer._shares(n, limit)
        assert whole >= 0 and members >= groups and whole + members <= n


def test_arguments_out_of_range() -> None:
    with pytest.raises(ZooError, match="centers must be 1 or more"):
        create("tca", centers=0)
    with pytest.raises(ZooError, match="counting must be one of"):
        create("tca", counting="all")
