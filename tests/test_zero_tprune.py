"""Properties of Zero-TPrune; there is no reference to compare with."""

from __future__ import annotations

import pytest
import torch

import reduction
import zoo
from reduction.methods.zero_tprune import informative_mean, weighted_pagerank
from reduction.tokens import Signals, Tokens
from tests.cases import backbone
from zoo.errors import ZooError


def attention(batch: int = 2, heads: int = 3, n: int = 12, sharp: float = 1.0) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    return (sharp * torch.randn(batch, heads, n, n, generator=g)).softmax(-1)


def test_votes_converge_to_the_dominant_left_eigenvector() -> None:
    a = attention().double()
    got = weighted_pagerank(a, torch.ones(2, 3, 12), 200)
    values, vectors = torch.linalg.eig(a.transpose(2, 3))
    for b in range(2):
        for h in range(3):
            at = values[b, h].abs().argmax()
            vector = vectors[b, h, :, at].real
            assert torch.allclose(got[b, h], vector / vector.mean(), atol=1e-9)


def test_one_vote_from_uniform_is_the_mean_attention_received() -> None:
    a = attention()
    got = weighted_pagerank(a, torch.ones(2, 3, 12), 1)
    assert torch.allclose(got, 12 * a.mean(2), atol=1e-6)


def test_voting_among_some_is_voting_in_the_submatrix() -> None:
    a = attention().double()
    live = torch.ones(2, 12)
    live[:, [1, 4, 5]] = 0
    at = live[0].nonzero().flatten()
    part = a[:, :, at][..., at]
    part = part / part.sum(-1, keepdim=True)
    expected = weighted_pagerank(part, torch.ones(2, 3, 9), 4)
    got = weighted_pagerank(a, torch.ones(2, 3, 12), 4, live)
    assert torch.allclose(got[..., at], expected)
    assert (got[..., [1, 4, 5]] == 0).all()


def test_heads_that_agree_on_all_or_on_one_token_do_not_count() -> None:
    flat, even = torch.ones(8), torch.tensor([1.5, 0.5] * 4)
    spike = torch.tensor([8.0] + [0.0] * 7)
    score = torch.stack([flat, even, spike])[None]
    live = torch.ones(1, 8)
    assert torch.allclose(informative_mean(score, live), even[None])
    everyone = score.square().mean(1).sqrt()
    assert torch.allclose(informative_mean(score, live, 0.0, None), everyone)
    # Nobody is left: all count.
    assert torch.allclose(informative_mean(score, live, 0.3, 0.4), everyone)


def signals(n: int, prefix: int = 1) -> tuple[Tokens, Signals]:
    g = torch.Generator().manual_seed(3)
    t = Tokens.start(torch.randn(1, prefix + n, 8, generator=g), prefix, track=True)
    attn = (3 * torch.randn(1, 2, prefix + n, prefix + n, generator=g)).softmax(-1)
    return t, Signals(attn=attn, k=torch.randn(1, 2, prefix + n, 4, generator=g))


def step(keep: int, prune: int | None = None) -> reduction.Step:
    return reduction.Step(1, 6, reduction.Budget(keep, prune), (4, 4))


def test_a_duplicate_of_an_important_token_goes_first() -> None:
    t, s = signals(16)
    reducer = reduction.create("zero_tprune", similar_share=1.0)
    # Patch 5 gets all the votes, patch 9 hardly any, and their keys are the same.
    attn = s.attn.clone()
    attn[..., 6], attn[..., 10] = 5.0, 1e-3
    s = s._replace(attn=attn / attn.sum(-1, keepdim=True))
    s.k[:, :, 10] = s.k[:, :, 6]
    gone = set(range(16)) - set(reducer.assign(t, s, step(15)).index[0].tolist())
    assert gone == {9}


def test_a_permutation_of_the_patches_changes_nothing_but_their_order() -> None:
    t, s = signals(16)
    reducer = reduction.create("zero_tprune")
    kept = reducer.assign(t, s, step(9)).index[0].sort().values
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    rows = torch.cat([torch.zeros(1, dtype=torch.int64), order + 1])
    moved = Signals(attn=s.attn[:, :, rows][..., rows], k=s.k[:, :, rows])
    again = reducer.assign(t._replace(x=t.x[:, rows]), moved, step(9)).index[0]
    assert torch.equal(order[again].sort().values, kept)


def test_the_schedule_may_give_both_counts() -> None:
    t, s = signals(16)
    all_similar = reduction.create("zero_tprune", similar_share=1.0)
    none_similar = reduction.create("zero_tprune", similar_share=0.0)
    for reducer in (all_similar, none_similar):
        kept = [set(reducer.assign(t, s, step(10, p)).index[0].tolist()) for p in (10, 16)]
        assert kept[0] == set(all_similar.assign(t, s, step(10)).index[0].tolist())
        assert kept[1] == set(none_similar.assign(t, s, step(10)).index[0].tolist())
        assert kept[0] != kept[1]


def test_refusals_and_the_last_block() -> None:
    for bad in ({"start_from": "x"}, {"iterations": 0}, {"similar_share": 2}, {"max_variance": 0}):
        with pytest.raises(ZooError):
            reduction.create("zero_tprune", **bad)
    m = zoo.wrap(backbone("plain"), "zero_tprune", {"name": "constant_r", "r": 4})
    assert m.token_counts()[-1] == (53, 53)


def test_the_card_says_what_it_is() -> None:
    card = reduction.card("zero_tprune")
    assert card.code is None and "no reference" in card.note
