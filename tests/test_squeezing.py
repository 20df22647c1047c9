"""Joint pruning and squeezing: what must hold whatever the weights."""

from __future__ import annotations

import math

import pytest
import torch

import reduction
import zoo
from reduction.assignment import apply
from reduction.functional.squeezing import squeeze, squeeze_masked
from reduction.methods import dynamicvit as dynamic
from reduction.tokens import Tokens
from tests.cases import backbone, images
from zoo.errors import ZooError


def squeezed(t, score, keep, temperature=1.0):
    """Keep the best tokens and squeeze the others into them."""
    order = score.argsort(dim=1, descending=True)
    return squeeze(t, order[:, :keep], order[:, keep:], temperature)


def tokens(n: int = 9, width: int = 6, prefix: int = 1) -> Tokens:
    generator = torch.Generator().manual_seed(3)
    return Tokens.start(torch.randn(2, prefix + n, width, generator=generator), prefix, track=True)


def slow(x: torch.Tensor, kept: list[int], temperature: float) -> torch.Tensor:
    """One image `(N, C)` by the formula, token by token."""
    unit = x / (x.norm(dim=-1, keepdim=True) + 1e-6)
    top = {j: math.e * x[j] for j in kept}
    low = dict.fromkeys(kept, math.e)
    for i in set(range(len(x))) - set(kept):
        cosines = {j: float(unit[i] @ unit[j]) for j in kept}
        host = max(cosines, key=lambda j: cosines[j])
        weight = math.exp(cosines[host] / temperature)
        top[host] = top[host] + weight * x[i]
        low[host] += weight
    return torch.stack([top[j] / low[j] for j in kept])


@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_squeezing_is_the_formula(temperature: float) -> None:
    t = tokens()
    score = torch.rand(2, 9, generator=torch.Generator().manual_seed(5))
    chosen = squeezed(t, score, 4, temperature)
    out = apply(t, chosen)
    for b in range(2):
        expected = slow(t.patches[b], chosen.leader[b].tolist(), temperature)
        assert torch.allclose(out.patches[b], expected, atol=1e-6)
    assert torch.equal(out.size[:, 1:].sum(1), torch.full((2,), 9.0))
    assert (out.source >= 0).all()


def test_masked_squeezing_agrees_with_removal_on_the_kept_tokens() -> None:
    t = tokens()
    score = torch.rand(2, 9, generator=torch.Generator().manual_seed(6))
    chosen = squeezed(t, score, 4)
    kept = torch.zeros(2, 9).scatter(1, chosen.leader, 1.0)
    y = squeeze_masked(t.patches, kept, 1 - kept)
    rows = y.gather(1, chosen.leader.unsqueeze(-1).expand(-1, -1, y.shape[-1]))
    assert torch.allclose(rows, apply(t, chosen).patches, atol=1e-6)
    # A token that leaves keeps its own features; nobody is squeezed into it.
    gone = (kept == 0).unsqueeze(-1)
    assert torch.allclose(torch.where(gone, y, 0.0), torch.where(gone, t.patches, 0.0), atol=1e-6)


def test_a_twin_weighs_as_much_as_its_host() -> None:
    x = torch.randn(1, 4, 6, generator=torch.Generator().manual_seed(0))
    x = torch.cat([x, x[:, :1]], 1)
    chosen = squeezed(Tokens.start(x, 0), torch.tensor([[5.0, 4, 3, 2, 1]]), 4)
    assert torch.allclose(chosen.coef, torch.full((1, 1), 0.5), atol=1e-5)


def test_keeping_or_losing_all_changes_nothing() -> None:
    x = tokens().patches
    ones, zeros = torch.ones(2, 9), torch.zeros(2, 9)
    assert torch.allclose(squeeze_masked(x, ones, zeros), x, atol=1e-6)
    assert torch.allclose(squeeze_masked(x, zeros, ones), x, atol=1e-6)


def test_the_order_of_patches_does_not_matter() -> None:
    t = tokens()
    score = torch.rand(2, 9, generator=torch.Generator().manual_seed(7))
    order = torch.randperm(9, generator=torch.Generator().manual_seed(8))
    mixed = t._replace(x=torch.cat([t.x[:, :1], t.patches[:, order]], 1))
    one, other = apply(t, squeezed(t, score, 4)), apply(mixed, squeezed(mixed, score[:, order], 4))
    assert torch.allclose(one.x, other.x, atol=1e-6)


def test_training_agrees_with_evaluation_when_the_decisions_do(monkeypatch) -> None:
    """The first stage of a training pass with the decisions of evaluation gives its logits."""
    schedule = {"name": "keep_rate", "rate": 0.5, "blocks": [2]}
    m = zoo.wrap(backbone("plain"), "dtps", schedule).eval()
    x = images()
    with torch.no_grad():
        expected, info = m(x, return_info=True)
    kept = torch.zeros(2, 64)
    kept.scatter_(1, info.final.origin, 1.0)
    noise = torch.stack([kept, 1 - kept], -1) * 1e6
    monkeypatch.setattr(dynamic, "gumbel_noise", lambda shape, device: noise)
    m.train()
    with torch.no_grad():
        logits, info = m(x, return_info="trace")
    assert torch.equal((info.final.memory["kept.0"] > 0.5).float(), kept)
    assert torch.allclose(logits, expected, atol=1e-4)
    loss = m.auxiliary_losses(info, logits, torch.zeros(2, dtype=torch.int64))["ratio"]
    assert float(loss) == pytest.approx(0.0, abs=1e-9)


def test_no_tokens_kept_stays_finite(monkeypatch) -> None:
    m = zoo.wrap(backbone("plain"), "dtps", {"name": "keep_rate", "rate": 0.5}).train()
    drop = torch.tensor([-1e6, 1e6])
    monkeypatch.setattr(dynamic, "gumbel_noise", lambda shape, device: drop.expand(shape))
    logits = m(images())
    logits.square().mean().backward()
    assert logits.isfinite().all()
    assert all(p.grad.isfinite().all() for p in m.parameters() if p.grad is not None)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ZooError, match="token_loss must be one of"):
        reduction.create("dtps", token_loss="cosine")
    for name in ("dtps", "etps"):
        with pytest.raises(ZooError, match="temperature must be positive"):
            reduction.create(name, temperature=0)
