"""Properties of the BAT-like method; there is no reference to compare with."""

from __future__ import annotations

import pytest
import torch

import reduction
from reduction.assignment import apply
from reduction.tokens import Signals, Tokens
from zoo.errors import ZooError


def tokens(n: int = 16, batch: int = 2) -> tuple[Tokens, Signals]:
    g = torch.Generator().manual_seed(0)
    t = Tokens.start(torch.randn(batch, 1 + n, 8, generator=g), 1, track=True)
    return t, Signals(cls_row=torch.randn(batch, 3, 1 + n, generator=g).softmax(-1))


def step(keep: int) -> reduction.Step:
    return reduction.Step(1, 4, reduction.Budget(keep), (4, 4))


@pytest.mark.parametrize("attentive_share", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("pair_share", [0.0, 0.2, 0.5])
def test_counts_add_up_for_every_budget(attentive_share: float, pair_share: float) -> None:
    reducer = reduction.create("bat_like", attentive_share=attentive_share, pair_share=pair_share)
    for n in range(2, 30):
        for keep in range(1, n):
            attentive, pairs, clusters = reducer.split(n, keep)
            assert attentive - pairs + clusters == keep
            assert 0 <= pairs <= attentive // 2 and 1 <= clusters <= n - attentive


def test_groups_are_means_weighted_by_attention() -> None:
    t, s = tokens()
    merge = reduction.create("bat_like").assign(t, s, step(9))
    out = apply(t, merge)
    score = s.cls_row.mean(1)[:, 1:]
    for b in range(2):
        for m in range(9):
            member = merge.slot[b] == m
            weight = score[b, member] / score[b, member].sum()
            assert torch.allclose(out.patches[b, m], weight @ t.patches[b, member], atol=1e-6)
            assert out.patch_size[b, m] == member.sum() and member[merge.leader[b, m]]


def test_attentive_tokens_and_clusters_do_not_mix() -> None:
    t, s = tokens()
    reducer = reduction.create("bat_like")
    attentive, pairs, clusters = reducer.split(16, 9)
    assert pairs and clusters > 1
    merge = reducer.assign(t, s, step(9))
    rank = s.cls_row.mean(1)[:, 1:].argsort(1, descending=True).argsort(1)
    assert torch.equal(merge.slot < attentive - pairs, rank < attentive)


def test_the_closest_attentive_twins_merge() -> None:
    t, s = tokens(batch=1)
    order = s.cls_row.mean(1)[0, 1:].argsort(descending=True)
    # Twins on the two sides of the split: ranks 0 and 3.
    x = t.x.clone()
    x[0, 1 + order[3]] = x[0, 1 + order[0]] * 2
    reducer = reduction.create("bat_like")
    assert reducer.split(16, 9)[1] == 1
    slot = reducer.assign(t._replace(x=x), s, step(9)).slot[0]
    assert slot[order[3]] == slot[order[0]]
    assert len({int(slot[i]) for i in order[:7]}) == 6


def test_gradient_reaches_the_attention() -> None:
    t, s = tokens()
    row = s.cls_row.clone().requires_grad_()
    out = apply(t, reduction.create("bat_like").assign(t, Signals(cls_row=row), step(9)))
    out.x.square().sum().backward()
    assert row.grad is not None and row.grad.abs().max() > 0


def test_refusals_and_the_card() -> None:
    for bad in ({"attentive_share": 1.5}, {"pair_share": 0.6}, {"neighbors": 0}):
        with pytest.raises(ZooError):
            reduction.create("bat_like", **bad)
    card = reduction.card("bat_like")
    assert card.code is None and "not public" in card.note
