"""Properties of centres that follow by a moving average."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import reduction
import zoo
from reduction.functional.matching import unit
from reduction.methods.ema_centres import Centres
from tests.cases import backbone, images
from zoo.errors import ZooError

SCHEDULE = {"name": "keep_rate", "rate": 0.5, "blocks": [1]}


def model(seed: int = 0, **args: object) -> torch.nn.Module:
    m = backbone("plain")
    torch.manual_seed(seed)
    return zoo.wrap(m, {"name": "ema_centres", **args}, SCHEDULE).eval()


def state(m: torch.nn.Module) -> list[torch.Tensor]:
    return [b.clone() for b in m.reducer.buffers()]


def test_evaluation_never_moves_a_centre_and_training_does() -> None:
    m = model()
    before = state(m)
    m(images())
    assert all(torch.equal(a, b) for a, b in zip(before, state(m), strict=True))
    m.train()(images())
    assert not any(torch.equal(a, b) for a, b in zip(before, state(m), strict=True))
    assert not list(m.reducer.parameters())


def test_a_token_joins_the_nearest_centre_unless_a_centre_has_none() -> None:
    m = model()
    with torch.no_grad():
        _, info = m(images(3), return_info="trace")
    # Every centre of every image has a token.
    for b in range(3):
        assert info.trace[1].source[b].unique().numel() == 32
        assert info.trace[1].size[b, 1:].sum() == 64
    # Tokens that lie on the centres go there, whatever their length.
    reducer = m.reducer
    centre = torch.zeros(32, 48)
    centre[torch.arange(32), torch.arange(32)] = 1.0
    reducer.stages[0].total.copy_(centre)
    order = torch.arange(64).remainder(32)
    x = torch.cat([torch.randn(1, 1, 48), centre[order][None] * torch.rand(1, 64, 1).add(0.5)], 1)
    t = reduction.Tokens.start(x, 1, track=True)
    out = reducer.reduce(t, reduction.Signals(), reduction.Step(1, 4, reduction.Budget(32), (8, 8)))
    assert torch.equal(out.source[0], order)


def test_the_average_follows_the_tokens() -> None:
    part = Centres(2, 3)
    part.total.copy_(torch.tensor([[1.0, 0, 0], [0, 1.0, 0]]))
    part.usage.copy_(torch.tensor([4.0, 4.0]))
    seen = torch.zeros(2, 7)
    seen[0, :3], seen[0, 3] = torch.tensor([0.0, 0, 8]), 8
    seen[1, :3], seen[1, 3] = torch.tensor([0.0, 4, 0]), 4
    part.observe(seen, 0.75)
    assert torch.allclose(part.total, torch.tensor([[0.75, 0, 2.0], [0, 1.75, 0]]))
    assert torch.allclose(part.usage, torch.tensor([5.0, 4.0]))


def test_a_centre_that_nobody_chooses_moves_to_a_token() -> None:
    part = Centres(2, 3)
    part.usage.copy_(torch.tensor([4.0, 0.0]))
    seen = torch.zeros(2, 7)
    seen[0, 3] = 8
    seen[:, 4:] = torch.tensor([[0.0, 0, 5], [0, 3, 4]])
    part.observe(seen, 0.5)
    assert torch.allclose(unit(part.total)[1], torch.tensor([0.0, 0.6, 0.8]))
    assert part.usage[1] == 3.0  # an even share


def distortion(m: torch.nn.Module, x: torch.Tensor) -> float:
    """Mean of one minus the cosine of each token and its centre."""
    seen = []
    original = m.reducer._metric
    m.reducer._metric = lambda t, s: seen.append(original(t, s)) or seen[-1]
    with torch.no_grad():
        m(x)
    del m.reducer._metric
    cosine = unit(seen[0]) @ unit(m.reducer.stages[0].total).T
    return float((1 - cosine.max(-1).values).mean())


def test_fitting_finds_better_centres_and_leaves_everything_else() -> None:
    m = model()
    weights = {k: v.clone() for k, v in m.backbone.state_dict().items()}
    start = distortion(m, images(8, seed=9))
    m.reducer.fit(m, (images(8, seed=s) for s in range(10)))
    assert distortion(m, images(8, seed=9)) < 0.7 * start
    assert not any(part.training for part in m.modules())
    assert all(torch.equal(v, weights[k]) for k, v in m.backbone.state_dict().items())
    assert all(part.grad is None for part in m.parameters())


def test_checkpointing_recomputes_with_the_same_centres() -> None:
    results = []
    for enable in (False, True):
        m = model().train()
        m.set_grad_checkpointing(enable)
        torch.manual_seed(0)
        m(images()).square().mean().backward()
        results.append((state(m), [p.grad for p in m.parameters()]))
    for a, b in zip(results[0][0] + results[0][1], results[1][0] + results[1][1], strict=True):
        assert torch.equal(a, b)


def _process(rank: int, port_file: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{port_file}", rank=rank, world_size=2)
    m = torch.nn.parallel.DistributedDataParallel(model().train())
    for s in range(2):
        torch.manual_seed(10 * rank + s)
        m(images(4, seed=s)[rank * 2 : rank * 2 + 2]).square().mean().backward()
    torch.save(state(m.module), f"{out}.{rank}")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")
def test_processes_share_their_centres(tmp_path: Path) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    out = str(tmp_path / "state")
    mp.spawn(_process, (str(tmp_path / "rendezvous"), out), nprocs=2)
    one, other = (torch.load(f"{out}.{r}", weights_only=True) for r in (0, 1))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    # As many tokens as both processes saw, averaged over two batches.
    assert one[1].sum() == pytest.approx((1 - 0.95**2) * 4 * 64, rel=0.3)
    assert one[1].sum() > 1.5 * (1 - 0.95**2) * 2 * 64


def test_smaller_images_use_the_first_centres() -> None:
    m = zoo.wrap(backbone("plain", dynamic_img_size=True), "ema_centres", SCHEDULE).eval()
    assert m.reducer.count(20, reduction.Step(1, 4, reduction.Budget(10), (4, 5))) == 20
    assert m.reducer.count(300, reduction.Step(1, 4, reduction.Budget(150), (15, 20))) == 32


def test_refusals_and_the_label() -> None:
    for bad in ({"metric": "value"}, {"momentum": 1.0}, {"momentum": -0.1}):
        with pytest.raises(ZooError):
            reduction.create("ema_centres", **bad)
    card = reduction.card("ema_centres")
    assert card.venue == "ours" and "(ours)" in card.title and card.arxiv is None
