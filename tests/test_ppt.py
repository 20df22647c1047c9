"""PPT: which images prune, which pool, and what each of them leaves."""

from __future__ import annotations

import pytest
import torch

import reduction
import zoo
from reduction.methods.ppt import significance
from reduction.tokens import Tokens
from tests.cases import backbone, images
from zoo.errors import ZooError

STAGES = {"name": "constant_r", "r": [0, 20, 12]}


def example(batch: int = 4) -> tuple[Tokens, reduction.Signals]:
    g = torch.Generator().manual_seed(5)
    t = Tokens.start(torch.randn(batch, 21, 6, generator=g), 1, track=True)
    size = torch.randint(1, 4, (batch, 21), generator=g).float()
    sharpness = torch.tensor([0.1, 3.0, 0.2, 2.0])[:batch].view(-1, 1, 1)
    row = (torch.randn(batch, 3, 21, generator=g) * sharpness).softmax(-1)
    k, v = torch.randn(2, batch, 3, 21, 8, generator=g)
    return t._replace(size=size), reduction.Signals(k=k, v=v, cls_row=row)


def run(t: Tokens, s: reduction.Signals, **args: object) -> Tokens:
    step = reduction.Step(1, 4, reduction.Budget(13), (4, 5))
    return reduction.create("ppt", patches=None, **args).reduce(t, s, step)


def only(t: Tokens, s: reduction.Signals, b: int) -> tuple[Tokens, reduction.Signals]:
    one = slice(b, b + 1)
    t = t._replace(x=t.x[one], size=t.size[one], origin=t.origin[one], source=t.source[one])
    return t, reduction.Signals(k=s.k[one], v=s.v[one], cls_row=s.cls_row[one])


def test_significance_against_a_loop() -> None:
    t, s = example(2)
    ours = significance(s.cls_row.mean(1)[:, 1:], s.v[:, :, 1:])
    for b in range(2):
        raw = [
            sum(float(s.cls_row[b, h, j]) for h in range(3))
            * float(torch.cat([s.v[b, h, j] for h in range(3)]).norm())
            for j in range(1, 21)
        ]
        assert torch.allclose(ours[b], torch.tensor(raw) / sum(raw), atol=1e-6)


def test_zero_always_prunes_the_least_significant_in_descending_order() -> None:
    t, s = example()
    out = run(t, s, threshold=0.0)
    score = significance(s.cls_row.mean(1)[:, 1:], s.v[:, :, 1:])
    kept = score.argsort(dim=1, descending=True)[:, :13]
    for b in range(4):
        assert torch.allclose(out.patches[b], t.patches[b, kept[b]], atol=1e-6)
        assert torch.equal(out.patch_size[b], t.patch_size[b, kept[b]])
        assert int((out.source[b] == -1).sum()) == 7


def test_one_always_pools_like_tome() -> None:
    m = backbone("plain")
    pooled = zoo.wrap(m, {"name": "ppt", "threshold": 1.0}, STAGES).eval()
    merged = zoo.wrap(m, "tome", STAGES).eval()
    with torch.no_grad():
        assert torch.allclose(pooled(images()), merged(images()), atol=1e-5)
        pruned = zoo.wrap(m, {"name": "ppt", "threshold": 0.0}, STAGES).eval()
        assert (pruned(images()) - merged(images())).abs().max() > 1e-3


def test_one_batch_does_both_and_each_image_as_if_alone() -> None:
    t, s = example()
    score = significance(s.cls_row.mean(1)[:, 1:], s.v[:, :, 1:])
    spread = torch.stack([((q - q.mean()) ** 2).sum() / 19 for q in score])  # unbiased: n - 1
    low, high = spread.sort().values[1:3].tolist()
    out = run(t, s, threshold=(low + high) / 2)
    pruned = [bool((out.source[b] == -1).any()) for b in range(4)]
    assert pruned == (spread >= (low + high) / 2).tolist() and sum(pruned) == 2
    for b in range(4):
        alone = run(*only(t, s, b), threshold=(low + high) / 2)
        assert torch.allclose(alone.x[0], out.x[b], atol=1e-6)
        assert torch.equal(alone.source[0], out.source[b])
    # The variance itself is where pruning begins, so it is the unbiased one.
    edge = float(spread.sort().values[1])
    flips = [
        (run(t, s, threshold=edge * f).source == -1).any(1).sum().item() for f in (0.999, 1.001)
    ]
    assert flips == [3, 2]


def test_without_proportional_attention_pooling_forgets_sizes() -> None:
    t, s = example()
    out = run(t, s, threshold=1.0, prop_attn=False)
    for b in range(4):
        for slot in range(out.n):
            members = (out.source[b] == slot).nonzero().flatten()
            assert torch.allclose(out.patches[b, slot], t.patches[b, members].mean(0), atol=1e-6)
            assert out.patch_size[b, slot] == t.patch_size[b, members].sum()


def test_the_threshold_follows_the_grid() -> None:
    reducer = reduction.create("ppt")
    assert reducer.threshold_at((14, 14)) == 7e-5
    assert reducer.threshold_at((28, 28)) == pytest.approx(7e-5 / 16)
    assert reduction.create("ppt", patches=None).threshold_at((28, 28)) == 7e-5
    for args in ({"threshold": -1.0}, {"threshold": "high"}, {"patches": 0}):
        with pytest.raises(ZooError, match="must be"):
            reduction.create("ppt", **args)
