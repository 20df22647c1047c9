"""PiToMe: energies, counts, protection, and independence of the order of patches."""

from __future__ import annotations

import math

import pytest
import torch

import reduction
import zoo
from reduction.functional import energy as energies
from reduction.functional.energy import energy
from reduction.tokens import Tokens, take_rows
from tests.cases import backbone, images
from zoo.errors import ZooError

OFFICIAL = {"name": "keep_rate", "of": "current", "rounding": "ceil", "blocks": "all"}


def step(keep: int, block: int = 0, depth: int = 4) -> reduction.Step:
    return reduction.Step(block, depth, reduction.Budget(keep), (8, 8))


def reduced(k: torch.Tensor, keep: int, block: int = 0, **args: object) -> Tokens:
    t = Tokens.start(
        torch.arange(k.shape[2] * 3.0).view(1, -1, 3).repeat(k.shape[0], 1, 1), 0, True
    )
    return reduction.create("pitome", **args).reduce(t, reduction.Signals(k=k), step(keep, block))


def test_energy_against_a_double_loop() -> None:
    u = torch.nn.functional.normalize(torch.randn(9, 5), dim=-1)
    for kind in ("elu", "paper"):
        expected = torch.zeros(9)
        for i in range(9):
            for j in range(9):
                cos = float(u[i] @ u[j])
                above = cos if kind == "paper" else cos - 0.3
                expected[i] += (above if cos > 0.3 else math.exp(cos - 0.3) - 1) / 9
        assert torch.allclose(energy((u @ u.T).unsqueeze(0), 0.3, kind)[0], expected, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_energies_of_a_few_rows_at_a_time_are_those_of_all(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    u = torch.nn.functional.normalize(torch.randn(3, 37, 8), dim=-1).to(dtype)
    similarity = u @ u.transpose(1, 2)
    for kind in ("elu", "paper"):
        whole = energy(similarity, 0.3, kind)
        for block in (1, 100, 37 * 37, 4000):
            monkeypatch.setattr(energies, "_BLOCK", block)
            assert torch.equal(energy(similarity, 0.3, kind), whole)
        monkeypatch.undo()


@pytest.mark.parametrize("rate", [0.85, 0.9, 0.9125, 0.925, 0.95, 0.7, 0.55])
def test_the_official_counts(rate: float) -> None:
    m = backbone("plain", img_size=56, depth=12)
    counts = zoo.wrap(m, "pitome", {**OFFICIAL, "rate": rate}).token_counts()
    n = 196
    for _, leaving in counts:
        n -= math.floor(n - n * rate)
        assert leaving == n + 1
    if rate == 0.9:
        assert [c - 1 for _, c in counts] == [177, 160, 144, 130, 117, 106, 96, 87, 79, 72, 65, 59]


def test_modes_and_margins_of_the_blocks() -> None:
    deit, mae = reduction.create("pitome"), reduction.create("pitome", mode="pitome_first")
    assert [deit.mode_of(b, 5) for b in range(5)] == ["bsm"] * 3 + ["pitome"] * 2
    assert [mae.mode_of(b, 5) for b in range(5)] == ["pitome"] * 3 + ["bsm"] * 2
    assert [deit.margin_of(b, 6) for b in range(6)] == [0.75, 0.625, 0.5, 0.375, 0.25, 0.125]
    listed = reduction.create("pitome", mode=["bsm", "pitome"], margin=[0.5, 0.1])
    assert listed.mode_of(1, 6) == "pitome" and listed.margin_of(1, 6) == 0.1
    with pytest.raises(ZooError, match="one entry per block"):
        listed.mode_of(2, 6)


def test_the_least_energetic_tokens_come_out_unchanged() -> None:
    k = torch.randn(2, 3, 20, 8)
    out = reduced(k, 14, mode="pitome")
    u = torch.nn.functional.normalize(k.mean(1), dim=-1)
    order = energy(u @ u.transpose(1, 2), 0.75).argsort(dim=1)
    for b in range(2):
        slots = out.source[b, order[b, :8]]
        assert len(set(slots.tolist())) == 8 and (out.size[b, slots] == 1).all()
    assert out.size.sum(1).tolist() == [20.0, 20.0]


@pytest.mark.parametrize("mode", ["pitome", "bsm"])
def test_the_order_of_patches_does_not_matter(mode: str) -> None:
    m = backbone("plain").double()
    wrapped = zoo.wrap(m, {"name": "pitome", "mode": mode}, {"name": "constant_r", "r": 12}).eval()
    x = images(1).double()
    with torch.no_grad():
        expected = wrapped(x)
        tiles = x.unfold(2, 4, 4).unfold(3, 4, 4).flatten(2, 3)  # (1, 3, 64, 4, 4)
        order = torch.randperm(64)
        tiles = tiles[:, :, order].view(1, 3, 8, 8, 4, 4).permute(0, 1, 2, 4, 3, 5)
        m.pos_embed[:, 1:] = m.pos_embed[:, 1:][:, order].clone()
        assert (wrapped(tiles.reshape(1, 3, 32, 32)) - expected).abs().max() < 1e-10


@pytest.mark.parametrize("mode", ["pitome", "bsm"])
def test_equal_tokens_merge_without_nan(mode: str) -> None:
    for k in (torch.ones(1, 2, 9, 4), torch.zeros(1, 2, 9, 4)):
        out = reduced(k, 5, mode=mode)
        assert out.x.isfinite().all() and out.size.sum() == 9 and out.n == 5


def test_a_group_is_the_mean_weighted_by_size() -> None:
    torch.manual_seed(0)
    k = torch.randn(2, 3, 20, 8)
    t = Tokens.start(torch.randn(2, 20, 6), 0, track=True)
    t = t._replace(size=torch.randint(1, 5, (2, 20)).float())
    out = reduction.create("pitome").reduce(t, reduction.Signals(k=k), step(11))
    for b in range(2):
        for slot in range(out.n):
            members = (out.source[b] == slot).nonzero().flatten()
            weight = t.size[b, members]
            mean = (t.x[b, members] * weight[:, None]).sum(0) / weight.sum()
            assert torch.allclose(out.x[b, slot], mean, atol=1e-5)
            assert out.size[b, slot] == weight.sum()
    assert torch.equal(
        take_rows(t.origin, torch.zeros(2, 1, dtype=torch.int64)).flatten(), t.origin[:, 0]
    )


def test_bad_arguments_are_named() -> None:
    for args, match in (
        ({"mode": "tome"}, "mode must be"),
        ({"mode": ["bsm_first"]}, "mode must be"),
        ({"energy": "relu"}, "energy must be"),
        ({"margin": "high"}, "margin must be"),
    ):
        with pytest.raises(ZooError, match=match):
            reduction.create("pitome", **args)
