"""One bank for tokens that are put aside: what comes back is as it was."""

from __future__ import annotations

import pytest
import torch

import reduction
import zoo
from reduction import Keep, Signals, Tokens, apply
from reduction.functional.carriers import append
from reduction.mixins.parking import in_place, park, parked, unpark
from tests.cases import backbone, images


def start(n: int = 6) -> Tokens:
    torch.manual_seed(0)
    return Tokens.start(torch.randn(2, n + 1, 4), prefix=1, track=True, grid=(2, n // 2))


def test_tokens_parked_in_two_steps_come_back_to_their_places() -> None:
    t = now = start()
    for keep in (4, 1):
        order = torch.stack([torch.randperm(now.n) for _ in range(2)])
        kept, gone = order[:, :keep], order[:, keep:]
        now = park(now, apply(now, Keep(kept)), kept, gone)
    assert now.n == 1 and now.grid is None and [r.shape[1] for r in parked(now)] == [2, 3]
    back = unpark(now, in_place(now, parked(now)))
    assert torch.equal(back.x, t.x) and torch.equal(back.size, t.size) and back.grid == t.grid
    assert torch.equal(back.origin, t.origin) and torch.equal(back.source, t.source)
    assert not back.memory and back.n == 6


def test_what_came_later_stays_behind() -> None:
    t = start()
    kept, gone = torch.tensor([[5, 0], [1, 2]]), torch.tensor([[1, 2, 3, 4], [0, 3, 4, 5]])
    now = append(park(t, apply(t, Keep(kept)), kept, gone), torch.ones(2, 1, 4))
    back = unpark(now, in_place(now, parked(now)), behind=2)
    assert torch.equal(back.x, torch.cat([t.x, torch.ones(2, 1, 4)], 1)) and back.n == 7
    assert back.origin[:, -1].tolist() == [-1, -1] and back.grid == t.grid


@pytest.mark.parametrize("name", ["cropr", "evovit", "tokenlearner"])
@torch.no_grad()
def test_methods_that_park_restore_sizes_origins_and_places(name: str) -> None:
    args = {"fuser": True} if name == "tokenlearner" else {}
    m = zoo.wrap(backbone("plain"), {"name": name, **args}, {"name": "keep_rate", "rate": 0.5})
    _, info = m.eval()(images(), return_info="trace")
    final = info.trace[-1]
    assert final.n == 64 and (final.size == 1).all() and final.grid == (8, 8)
    assert torch.equal(final.source, torch.arange(64).expand(2, -1))
    assert not any(key.startswith("bank.") for key in final.memory)


def test_a_missing_signal_is_named() -> None:
    with pytest.raises(ValueError, match="signal 'k'.*needs"):
        Signals().need("k")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_clusters_stay_finite_for_features_of_any_length(dtype: torch.dtype) -> None:
    m = zoo.wrap(backbone("plain"), "dpcknn", {"name": "keep_rate", "rate": 0.5}).eval().to(dtype)
    step = reduction.Step(1, 4, reduction.Budget(9), (8, 8))
    for power in (0, 2, 4, 8):
        t = Tokens.start((torch.randn(2, 65, 48) * 10.0**power).to(dtype), prefix=1)
        out = m.reducer.reduce(t, Signals(), step)
        assert out.x.isfinite().all() and out.n == 9, power


@pytest.mark.parametrize("temperature", [1.0, 1 / 60, 0.01, 1e-4])
def test_squeezing_stays_finite_at_any_temperature(temperature: float) -> None:
    for name in ("etps", "dtps"):
        reducer = {"name": name, "temperature": temperature}
        m = zoo.wrap(backbone("plain"), reducer, {"name": "keep_rate", "rate": 0.5})
        assert m.eval()(images()).isfinite().all()
        loss = m.train()(images()).sum()
        loss.backward()
        assert loss.isfinite()
        assert all(p.grad is None or p.grad.isfinite().all() for p in m.parameters()), name
