"""ATC's clustering against scikit-learn and against cases solved by hand."""

from __future__ import annotations

import pytest
import torch
from sklearn.cluster import AgglomerativeClustering

import reduction
import zoo
from reduction.assignment import apply
from reduction.functional.agglomerative import LINKAGES, agglomerate, cosine_distances
from reduction.tokens import Signals, Tokens
from tests.cases import backbone, images
from zoo.errors import ZooError

linkages = pytest.mark.parametrize("linkage", LINKAGES)


def points(n: int, seed: int = 0, batch: int = 3) -> torch.Tensor:
    return torch.randn(batch, n, 5, generator=torch.Generator().manual_seed(seed))


def groups(labels) -> set[frozenset[int]]:
    out: dict[int, set[int]] = {}
    for point, label in enumerate(labels):
        out.setdefault(int(label), set()).add(point)
    return {frozenset(g) for g in out.values()}


@linkages
@pytest.mark.parametrize(("n", "k"), [(20, 7), (33, 1), (33, 32), (12, 12), (40, 3)])
def test_same_partition_as_scikit_learn(linkage: str, n: int, k: int) -> None:
    distance = cosine_distances(points(n, seed=k))
    slot, leader = agglomerate(distance, k, linkage)
    for i in range(3):
        model = AgglomerativeClustering(k, metric="precomputed", linkage=linkage)
        expected = groups(model.fit(distance[i].numpy()).labels_)
        assert groups(slot[i].tolist()) == expected
        assert leader[i].tolist() == sorted(min(g) for g in expected)
        assert torch.equal(slot[i, leader[i]], torch.arange(k))


@linkages
def test_blobs_far_apart_are_found(linkage: str) -> None:
    centre = torch.eye(3, 5).repeat_interleave(6, 0)[torch.randperm(18)]
    slot, _ = agglomerate(cosine_distances((centre + 0.05 * points(18)).float()), 3, linkage)
    for i in range(3):
        assert groups(slot[i].tolist()) == groups(centre.argmax(1).tolist())


def test_linkages_differ_where_they_should() -> None:
    """A chain: single linkage follows it, complete linkage cuts it in the middle."""
    x = torch.tensor([0.0, 1.0, 2.05, 3.15, 5.0])
    distance = (x - x.unsqueeze(1)).abs().unsqueeze(0)
    single = agglomerate(distance, 2, "single").slot[0].tolist()
    complete = agglomerate(distance, 2, "complete").slot[0].tolist()
    assert single == [0, 0, 0, 0, 1]
    assert complete == [0, 0, 1, 1, 1]


@linkages
def test_order_of_tokens_does_not_matter(linkage: str) -> None:
    x, order = points(24), torch.randperm(24, generator=torch.Generator().manual_seed(5))
    slot = agglomerate(cosine_distances(x), 9, linkage).slot
    moved = agglomerate(cosine_distances(x[:, order]), 9, linkage).slot
    for i in range(3):
        back = {frozenset(int(order[p]) for p in g) for g in groups(moved[i].tolist())}
        assert back == groups(slot[i].tolist())


def test_equal_tokens_and_zeros_are_no_trouble() -> None:
    x = torch.zeros(2, 9, 4)
    x[1] = 1.0
    slot, leader = agglomerate(cosine_distances(x), 4)
    assert all(len(groups(s.tolist())) == 4 for s in slot) and leader.shape == (2, 4)


@pytest.mark.parametrize("mean", ["size", "plain"])
def test_one_cluster_is_the_mean_of_everything(mean: str) -> None:
    x, size = torch.randn(2, 13, 6), torch.rand(2, 13) + 0.5
    t = Tokens.start(x, 1, track=True)._replace(size=size, unit=False)
    step = reduction.Step(0, 4, reduction.Budget(1), (3, 4))
    reducer = reduction.create("atc", mean=mean)
    out = apply(t, reducer.assign(t, Signals(k=torch.randn(2, 2, 13, 3)), step))
    weight = size[:, 1:] if mean == "size" else torch.ones(2, 12)
    expected = (x[:, 1:] * weight.unsqueeze(2)).sum(1) / weight.sum(1, keepdim=True)
    assert torch.allclose(out.patches[:, 0], expected, atol=1e-5)
    # Sizes are kept either way.
    assert torch.allclose(out.patch_size[:, 0], size[:, 1:].sum(1))
    assert torch.equal(out.x[:, 0], x[:, 0]) and (out.source == 0).all()


def test_keep_all_is_the_dense_model_and_sizes_add_up() -> None:
    m, x = backbone("plain"), images()
    with torch.no_grad():
        full = zoo.wrap(m, "atc", {"name": "constant_r", "r": 0}).eval()
        assert torch.equal(full(x), m(x))
        _, info = zoo.wrap(m, "atc", {"name": "keep_rate", "rate": 0.3}).eval()(x, True)
    assert info.tokens[-1][1] == 1 + 1
    assert torch.allclose(info.size.sum(1), torch.full((2,), 65.0))


def test_unknown_options_are_refused() -> None:
    with pytest.raises(ZooError, match="linkage must be one of"):
        reduction.create("atc", linkage="ward")
    with pytest.raises(ZooError, match="mean must be one of"):
        reduction.create("atc", mean="median")
