"""Properties of the hybrid: who is dropped, who merges into whom, how many."""

from __future__ import annotations

import pytest
import torch

import reduction
from reduction.assignment import Keep, Merge, apply
from reduction.tokens import Signals, Tokens
from zoo.errors import ZooError


def tokens(n: int = 16, batch: int = 3) -> tuple[Tokens, Signals]:
    g = torch.Generator().manual_seed(0)
    t = Tokens.start(torch.randn(batch, 1 + n, 8, generator=g), 1, track=True)
    row = torch.randn(batch, 3, 1 + n, generator=g).softmax(-1)
    return t, Signals(cls_row=row, k=torch.randn(batch, 3, 1 + n, 4, generator=g))


def step(keep: int, prune: int | None = None) -> reduction.Step:
    return reduction.Step(1, 4, reduction.Budget(keep, prune), (4, 4))


def make(**args: object) -> reduction.Reducer:
    return reduction.create("importance_then_similarity", **args)


@pytest.mark.parametrize("share", [0.0, 0.25, 0.6, 1.0])
def test_every_budget_is_met(share: float) -> None:
    t, s = tokens()
    for keep in range(1, 16):
        out = apply(t, make(prune_share=share).assign(t, s, step(keep)))
        assert out.n == keep and out.x.isfinite().all()


def test_the_least_attended_leave_without_a_trace_and_the_most_attended_stay_themselves() -> None:
    t, s = tokens()
    out = apply(t, make(prune_share=0.5).assign(t, s, step(10)))
    rank = s.cls_row.mean(1)[:, 1:].argsort(1, descending=True)
    for b in range(3):
        gone = (out.source[b] < 0).nonzero().flatten().tolist()
        assert set(gone) == set(rank[b, 13:].tolist())
        leaders = set(out.origin[b].tolist())
        assert set(rank[b, :7].tolist()) <= leaders
        assert out.size[b, 1:].sum() == 13


def test_the_closest_of_the_less_important_merge() -> None:
    t, s = tokens(batch=1)
    order = s.cls_row.mean(1)[0, 1:].argsort(descending=True)
    x = t.x.clone()
    x[0, 1 + order[12]] = 3 * x[0, 1 + order[2]]
    merge = make(prune_share=0.0).assign(t._replace(x=x), s, step(15))
    assert isinstance(merge, Merge) and merge.pairs is not None
    assert merge.pairs[0].tolist() == [[order[12].item()]]
    assert merge.leader[0, merge.pairs[1]].item() == order[2]
    out = apply(t._replace(x=x), merge)
    slot = out.source[0, order[2]]
    assert torch.allclose(out.patches[0, slot], 2 * x[0, 1 + order[2]])
    assert out.patch_size[0, slot] == 2


def test_order_of_the_patches_does_not_matter() -> None:
    t, s = tokens(batch=1)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    rows = torch.cat([torch.zeros(1, dtype=torch.int64), order + 1])
    for args in ({}, {"metric": "key"}):
        one = apply(t, make(**args).assign(t, s, step(9)))
        moved = Signals(cls_row=s.cls_row[..., rows], k=s.k[:, :, rows])
        other_t = t._replace(x=t.x[:, rows])
        other = apply(other_t, make(**args).assign(other_t, moved, step(9)))
        assert torch.allclose(one.x, other.x, atol=1e-6)


def test_counts_of_the_schedule_come_first() -> None:
    reducer = make(prune_share=0.0)
    assert reducer.survivors(16, step(10)) == 16
    assert reducer.survivors(16, step(10, 12)) == 12
    assert reducer.survivors(16, step(5)) == 10  # half at most can merge
    assert reducer.survivors(16, step(10, 4)) == 10
    t, s = tokens()
    assert isinstance(reducer.assign(t, s, step(10, 10)), Keep)


def test_refusals_and_the_label() -> None:
    for bad in ({"prune_share": -0.1}, {"metric": "value"}, {"score_from": "x"}):
        with pytest.raises(ZooError):
            make(**bad)
    card = reduction.card("importance_then_similarity")
    assert card.venue == "ours" and "(ours)" in card.title and card.arxiv is None
