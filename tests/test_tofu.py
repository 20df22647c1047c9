"""ToFu: what pruning leaves, what MLERP does to length and direction, and both count rules."""

from __future__ import annotations

import math

import pytest
import torch

import reduction
import zoo
from reduction.tokens import Tokens
from tests.cases import backbone
from zoo.errors import ZooError


def run(block: int, keep: int = 12, **args: object) -> tuple[Tokens, Tokens]:
    g = torch.Generator().manual_seed(3)
    k = torch.randn(2, 3, 21, 8, generator=g)
    t = Tokens.start(torch.randn(2, 21, 6, generator=g), 1, track=True)
    step = reduction.Step(block, 4, reduction.Budget(keep), (4, 5))
    return t, reduction.create("tofu", **args).reduce(t, reduction.Signals(k=k), step)


def groups(t: Tokens, out: Tokens) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Members, their destination and the result, of every group."""
    found = []
    for b in range(t.x.shape[0]):
        for slot in range(out.n):
            members = (out.source[b] == slot).nonzero().flatten()
            leader = int(out.origin[b, slot])
            found.append((t.patches[b, members], t.patches[b, leader], out.patches[b, slot]))
    return found


def test_early_blocks_leave_destinations_bit_for_bit() -> None:
    for block in (0, 2):
        t, out = run(block)
        assert out.n == 12 and torch.equal(out.x[:, 0], t.x[:, 0])
        for _, leader, result in groups(t, out):
            assert torch.equal(result, leader)
        assert out.size.sum().item() == 42
        assert max(len(m) for m, _, _ in groups(t, out)) > 1


def test_mlerp_keeps_the_largest_length_and_the_direction_of_the_mean() -> None:
    t, out = run(3)
    larger = 0
    for members, leader, result in groups(t, out):
        if len(members) == 1:
            assert torch.equal(result, leader)
            continue
        larger += len(members) > 2
        mean = members.mean(0)
        assert torch.allclose(result.norm(), members.norm(dim=1).max(), rtol=1e-5)
        assert torch.cosine_similarity(result, mean, dim=0) > 1 - 1e-5
    assert larger > 0


def test_the_port_divides_by_the_destination() -> None:
    t, out = run(3, mlerp="port")
    differs = 0
    for members, leader, result in groups(t, out):
        expected = members.mean(0) * members.norm(dim=1).max() / leader.norm()
        assert torch.allclose(result, expected, atol=1e-6)
        differs += len(members) > 1
    assert differs > 0
    intended = run(3)[1].x
    plain = run(3, mlerp="mean")[1].x
    assert (intended - out.x).abs().max() > 0.1 and (plain - out.x).abs().max() > 0.1


def test_opposite_vectors_have_no_direction_and_no_nan() -> None:
    x = torch.tensor([[[1.0, 0.0], [-1.0, 0.0]]], requires_grad=True)
    t = Tokens.start(x, 0)
    step = reduction.Step(3, 4, reduction.Budget(1), (1, 2))
    for form in ("intended", "port", "mean"):
        out = reduction.create("tofu", mlerp=form).reduce(
            t, reduction.Signals(k=torch.ones(1, 1, 2, 3)), step
        )
        assert torch.equal(out.x.detach(), torch.zeros(1, 1, 2))
        (gradient,) = torch.autograd.grad(out.x.sum(), x)
        assert gradient.isfinite().all()


@pytest.mark.parametrize("rate", [0.95, 0.925, 0.9, 0.85, 0.75, 0.6])
def test_the_share_counts_the_class_token(rate: float) -> None:
    schedule = {"name": "keep_rate", "of": "current", "rounding": "ceil", "blocks": "all"}
    m = backbone("plain", img_size=56, depth=12)
    counts = zoo.wrap(m, "tofu", {**schedule, "rate": rate, "prefix": 1}).token_counts()
    n = 197
    for _, leaving in counts:
        n -= math.floor(n - n * rate)
        assert leaving == n
    if rate == 0.9:
        patches = zoo.wrap(m, "tofu", {**schedule, "rate": rate}).token_counts()
        assert patches != counts


def test_switch_says_which_blocks_prune() -> None:
    cases = (
        (None, [True] * 4 + [False] * 2),
        (-1, [False] * 6),
        (0, [True] + [False] * 5),
        (
            ["merge", "prune", "merge", "merge", "merge", "prune"],
            [False, True] + [False] * 3 + [True],
        ),
    )
    for switch, expected in cases:
        reducer = reduction.create("tofu", switch=switch)
        assert [reducer.prunes(b, 6) for b in range(6)] == expected
    with pytest.raises(ZooError, match="one entry per block"):
        reduction.create("tofu", switch=["merge"]).prunes(1, 6)
    for bad in ("prune", True, ["drop"], [], 1.5):
        with pytest.raises(ZooError, match="switch must be"):
            reduction.create("tofu", switch=bad)
    with pytest.raises(ZooError, match="mlerp must be"):
        reduction.create("tofu", mlerp="slerp")
