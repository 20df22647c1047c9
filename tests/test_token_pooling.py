"""Token Pooling: what its clustering promises, held against definitions, loops and brute force."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import zoo
from reduction import (
    Budget,
    Geometric,
    Keep,
    Reducer,
    Signals,
    Step,
    Tokens,
    ZooError,
    apply,
    create,
)
from reduction.functional import clustering
from reduction.functional.clustering import (
    Clusters,
    farthest_reach,
    heaviest,
    kmeans,
    kmedoids,
    mean_shares,
    spread,
    squared_distances,
    weighted_means,
)
from reduction.functional.received import column_mean
from tests.cases import backbone, images
from zoo.adapters.hollow import hollow
from zoo.cost.counters import fvcore_gmacs, torch_gmacs

SIZES = [1, 2, 20, 98, 195, 196]


def points(batch: int = 2, n: int = 196, width: int = 12, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A mixture of Gaussians and positive weights, in double precision."""
    g = torch.Generator().manual_seed(seed)
    centre = 3 * torch.randn(batch, 9, width, generator=g, dtype=torch.float64)
    member = torch.randint(0, 9, (batch, n), generator=g)
    noise = torch.randn(batch, n, width, generator=g, dtype=torch.float64)
    x = centre.gather(1, member.unsqueeze(-1).expand(-1, -1, width)) + noise
    return x, torch.rand(batch, n, generator=g, dtype=torch.float64) + 0.01


def medoid_error(distance: Tensor, found: Clusters, weight: Tensor | None = None) -> Tensor:
    """Weighted squared distances to the medoids, `(B,)`."""
    own = found.leader.gather(1, found.slot)
    gap = distance.gather(1, own.unsqueeze(1)).squeeze(1)
    return (gap if weight is None else gap * weight).sum(1)


def mean_error(x: Tensor, found: Clusters, weight: Tensor | None = None) -> Tensor:
    """Weighted squared distances to the weighted means, `(B,)`."""
    weight = torch.ones_like(x[..., 0]) if weight is None else weight
    centre = weighted_means(x, found.slot, weight, found.leader.shape[1])
    own = centre.gather(1, found.slot.unsqueeze(-1).expand_as(x))
    return ((x - own).square().sum(-1) * weight).sum(1)


def members(found: Clusters) -> Tensor:
    """Points per cluster, `(B, K)`."""
    return torch.zeros_like(found.leader).scatter_add(1, found.slot, torch.ones_like(found.slot))


def cluster(algorithm: str, x: Tensor, weight: Tensor | None, k: int, n: int = 5) -> Clusters:
    distance = squared_distances(x)
    first = spread(distance, k) if weight is None else heaviest(weight, k)
    if algorithm == "kmeans":
        return kmeans(x, first, weight, n)
    return kmedoids(distance, first, weight, n)


both = pytest.mark.parametrize("algorithm", ["kmedoids", "kmeans"])
weights = pytest.mark.parametrize("weighted", [True, False])


def test_distances_are_those_of_the_definition() -> None:
    x, _ = points()
    expected = torch.cdist(x, x).square()
    assert torch.allclose(squared_distances(x), expected, atol=1e-9)
    # A common offset would cost float32 all its digits without centring.
    far = (x + 1000).float()
    assert torch.allclose(squared_distances(far), expected.float(), rtol=1e-3, atol=1e-2)
    assert (squared_distances(x).diagonal(dim1=1, dim2=2) == 0).all()


@both
@weights
def test_k_equal_to_n_changes_nothing(algorithm: str, weighted: bool) -> None:
    x, w = points(n=30)
    found = cluster(algorithm, x, w if weighted else None, 30)
    identity = torch.arange(30).expand(2, -1)
    assert torch.equal(found.leader, identity) and torch.equal(found.slot, identity)


@both
@weights
@pytest.mark.parametrize("k", SIZES)
def test_the_objective_never_rises(algorithm: str, weighted: bool, k: int) -> None:
    x, w = points()
    w = w if weighted else None
    distance = squared_distances(x)
    last = None
    for n in range(1, 9):
        found = cluster(algorithm, x, w, k, n)
        error = mean_error(x, found, w)
        if algorithm == "kmedoids":
            error = medoid_error(distance, found, w)
        assert last is None or (error <= last * (1 + 1e-12) + 1e-12).all(), n
        last = error
    start = kmedoids(distance, spread(distance, k) if w is None else heaviest(w, k), w, 0)
    assert (last <= medoid_error(distance, start, w) + 1e-9).all()


def slow_kmedoids(distance: Tensor, first: list[int], weight: Tensor, n: int) -> Clusters:
    """One image, by loops over clusters and points."""
    size = len(distance)

    def nearest(medoids: list[int]) -> list[int]:
        out = []
        for i in range(size):
            gaps = [float(distance[m, i]) for m in medoids]
            out.append(medoids.index(i) if i in medoids else gaps.index(min(gaps)))
        return out

    medoids = sorted(first)
    for _ in range(n):
        slot = nearest(medoids)
        for k in range(len(medoids)):
            group = [i for i in range(size) if slot[i] == k]
            cost = [sum(float(distance[i, j] * weight[j]) for j in group) for i in group]
            medoids[k] = group[cost.index(min(cost))]
    medoids = sorted(medoids)
    return Clusters(torch.tensor([medoids]), torch.tensor([nearest(medoids)]))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 12), st.data())
def test_kmedoids_equals_a_loop(seed: int, n: int, data: Any) -> None:
    k = data.draw(st.integers(1, n))
    x, w = points(1, n, 4, seed)
    distance = squared_distances(x)
    first = heaviest(w, k)
    found = kmedoids(distance, first, w, 4)
    slow = slow_kmedoids(distance[0], first[0].tolist(), w[0], 4)
    assert torch.equal(found.leader, slow.leader) and torch.equal(found.slot, slow.slot)


@pytest.mark.parametrize("seed", range(5))
def test_a_medoid_is_the_best_member_of_its_cluster(seed: int) -> None:
    x, w = points(1, 8, 3, seed)
    distance = squared_distances(x)
    found = kmedoids(distance, heaviest(w, 3), w, 50)
    for k, leader in enumerate(found.leader[0].tolist()):
        group = (found.slot[0] == k).nonzero().flatten().tolist()
        cost = {i: sum((distance[0, i, j] * w[0, j]).item() for j in group) for i in group}
        assert cost[leader] <= min(cost.values()) + 1e-12


@pytest.mark.parametrize("seed", range(5))
def test_kmeans_ends_where_neither_step_helps(seed: int) -> None:
    x, w = points(1, 8, 3, seed)
    found = kmeans(x, heaviest(w, 3), w, 50)
    centre = weighted_means(x, found.slot, w, 3)
    assert torch.equal(torch.cdist(x, centre).argmin(2), found.slot)
    # And no partition into three beats the best of all starts.
    best = min(
        mean_error(x, kmeans(x, torch.tensor([start]), w, 50), w).item()
        for start in itertools.combinations(range(8), 3)
    )
    brute = min(
        mean_error(x, Clusters(torch.zeros(1, 3, dtype=torch.int64), torch.tensor([slot])), w)
        .nan_to_num(torch.inf)
        .item()
        for slot in itertools.product(range(3), repeat=8)
        if len(set(slot)) == 3
    )
    assert best == pytest.approx(brute)


@both
def test_two_blobs_are_found_from_any_start(algorithm: str) -> None:
    """Of equal size: a medoid among few stays with a majority, this being a local search."""
    x, _ = points(1, 12, 4)
    x = 0.1 * x + torch.where(torch.arange(12) < 6, 0.0, 50.0)[None, :, None]
    distance = squared_distances(x)
    for start in itertools.combinations(range(12), 2):
        first = torch.tensor([start])
        run = kmeans(x, first) if algorithm == "kmeans" else kmedoids(distance, first)
        assert run.leader[0, 0] < 6 <= run.leader[0, 1]
        assert run.slot[0].tolist() == [0] * 6 + [1] * 6


@both
def test_equal_weights_are_no_weights(algorithm: str) -> None:
    x, _ = points()
    distance, first = squared_distances(x), torch.arange(0, 196, 7).expand(2, -1)
    same = torch.full_like(x[..., 0], 0.3)
    for weight in (None, same):
        if algorithm == "kmeans":
            run = kmeans(x, first, weight)
        else:
            run = kmedoids(distance, first, weight)
        if weight is None:
            expected = run
    assert torch.equal(run.leader, expected.leader) and torch.equal(run.slot, expected.slot)


def test_a_heavy_token_is_a_medoid() -> None:
    x, w = points()
    for token in (0, 57, 195):
        heavy = w.clone()
        heavy[:, token] = 1e6
        for k in (1, 20):
            found = kmedoids(squared_distances(x), heaviest(heavy, k), heavy)
            assert (found.leader == token).any(1).all()


@pytest.mark.parametrize("k", [1, 20, 98])
def test_means_reconstruct_better_than_medoids(k: int) -> None:
    x, w = points()
    distance = squared_distances(x)
    found = kmedoids(distance, heaviest(w, k), w)
    assert (mean_error(x, found, w) < medoid_error(distance, found, w)).all()


@both
@weights
@pytest.mark.parametrize("kinds", [1, 3])
def test_duplicates_leave_no_cluster_empty(algorithm: str, weighted: bool, kinds: int) -> None:
    some, w = points(2, 40, 6)
    x = some[:, torch.arange(40) % kinds].float()
    w = torch.ones(2, 40) if weighted and kinds == 1 else w.float()
    for k in (1, 2, 17, 39):
        found = cluster(algorithm, x, w if weighted else None, k)
        assert (members(found) >= 1).all()
        assert torch.equal(found.slot.gather(1, found.leader), torch.arange(k).expand(2, -1))
        centre = weighted_means(x, found.slot, w, k)
        assert centre.isfinite().all()
        if k >= kinds and not weighted:
            assert mean_error(x, found).max() < 1e-6


@both
@weights
def test_the_order_of_the_tokens_does_not_matter(algorithm: str, weighted: bool) -> None:
    x, w = points()
    w = w if weighted else None
    shuffle = torch.randperm(196, generator=torch.Generator().manual_seed(3))
    back = shuffle.argsort()
    # Without weights, two points alone in a cluster are equally good medoids: a tie.
    for k in (5, 98) if weighted else (5,):
        found = cluster(algorithm, x, w, k)
        other = cluster(algorithm, x[:, shuffle], None if w is None else w[:, shuffle], k)
        same = found.slot.unsqueeze(1) == found.slot.unsqueeze(2)
        moved = other.slot[:, back]
        assert torch.equal(same, moved.unsqueeze(1) == moved.unsqueeze(2))
        assert torch.equal(shuffle[other.leader].sort(1).values, found.leader)


@both
def test_autocast_changes_no_assignment(algorithm: str) -> None:
    x, w = (v.float() for v in points())
    expected = cluster(algorithm, x, w, 40)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = cluster(algorithm, x, w, 40)
    assert torch.equal(got.slot, expected.slot) and torch.equal(got.leader, expected.leader)


@both
def test_stopping_early_changes_nothing(algorithm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = points()
    early = cluster(algorithm, x, w, 40, 30)
    monkeypatch.setattr(clustering, "eager_on_cpu", lambda x: False)
    full = cluster(algorithm, x, w, 40, 30)
    assert torch.equal(early.slot, full.slot) and torch.equal(early.leader, full.leader)


def test_not_a_number_is_no_crash() -> None:
    x, w = points(2, 30, 4)
    x[0, 3] = torch.nan
    for algorithm in ("kmedoids", "kmeans"):
        found = cluster(algorithm, x, w, 7)
        alone = cluster(algorithm, x[1:], w[1:], 7)
        assert torch.equal(found.slot[1:], alone.slot)
        assert found.leader.max() < 30 and found.slot.max() < 7


def test_shares_of_a_cluster_add_up_to_one() -> None:
    _, w = points()
    slot = torch.randint(0, 5, (2, 196))
    total = torch.zeros(2, 5, dtype=w.dtype).scatter_add(1, slot, mean_shares(w, slot, 5))
    assert torch.allclose(total, torch.ones_like(total))


# -- the reducer -----------------------------------------------------------------------------------


def tokens(n: int = 24, seed: int = 0) -> tuple[Tokens, Signals]:
    x, w = (v.float() for v in points(2, n + 1, 8, seed))
    t = Tokens.start(x, 1, track=True)
    row = w.unsqueeze(1).expand(-1, 3, -1)
    return t, Signals(column=w, cls_row=row, k=torch.randn(2, 3, n + 1, 4))


STEP = Step(0, 4, Budget(9), (4, 6))


@pytest.mark.parametrize("centre", ["mean", "medoid"])
@pytest.mark.parametrize("score", ["column_mean", "class", "key_norm", "none"])
@both
def test_tokens_are_the_centres(algorithm: str, score: str, centre: str) -> None:
    t, s = tokens()
    reducer: Any = create("token_pooling", algorithm=algorithm, centre=centre, score_from=score)
    out = reducer.reduce(t, s, STEP)
    assert out.n == 9 and not out.unit
    weight = reducer.weight(s, 1)
    found = cluster(algorithm, t.patches, weight, 9)
    assert torch.equal(out.source, found.slot) and torch.equal(out.origin, found.leader)
    assert torch.equal(out.patch_size, members(found).float())
    weight = torch.ones(2, 24) if weight is None else weight
    expected = t.patches.gather(1, found.leader.unsqueeze(-1).expand(-1, -1, 8))
    if centre == "mean":
        expected = torch.stack(
            [
                torch.stack(
                    [
                        (t.patches[b] * weight[b, :, None])[found.slot[b] == k].sum(0)
                        / weight[b][found.slot[b] == k].sum()
                        for k in range(9)
                    ]
                )
                for b in range(2)
            ]
        )
    assert torch.allclose(out.patches, expected, atol=1e-5)
    assert torch.equal(out.x[:, 0], t.x[:, 0])


def test_scores_are_what_they_say() -> None:
    t, s = tokens()
    assert s.k is not None and s.column is not None and s.cls_row is not None
    for score, raw in (
        ("column_mean", s.column[:, 1:]),
        ("class", s.cls_row.mean(1)[:, 1:]),
        ("key_norm", s.k[:, :, 1:].square().sum(-1).sqrt().mean(1)),
    ):
        weight = create("token_pooling", score_from=score).weight(s, 1)
        assert torch.allclose(weight, raw / raw.mean(1, keepdim=True)) and not weight.requires_grad
    zero = create("token_pooling").weight(Signals(column=torch.zeros(1, 5)), 1)
    assert (zero > 0).all() and zero.isfinite().all()


def test_gradient_reaches_every_token_through_means_only() -> None:
    t, s = tokens()
    for centre, reached in (("mean", 24), ("medoid", 9)):
        x = t.x.clone().requires_grad_()
        score = s.column.clone().requires_grad_()
        out = create("token_pooling", centre=centre).reduce(
            t._replace(x=x), Signals(column=score), STEP
        )
        out.patches.square().sum().backward()
        assert (x.grad[0, 1:].abs().sum(-1) > 0).sum() == reached
        assert score.grad is None


def test_the_last_block_is_left_alone() -> None:
    m = zoo.wrap(backbone("plain"), "token_pooling", {"name": "geometric", "rate": 0.7})
    assert [n - 1 for _, n in m.token_counts()] == [44, 31, 21, 21]
    plan = m.plan()
    assert plan[3].need == frozenset() and plan[2].need == {"column"}
    assert zoo.profile(m).blocks[3].reducer == 0


@pytest.mark.parametrize("score", ["column_mean", "class", "key_norm", "none"])
@both
def test_its_cost_is_counted(algorithm: str, score: str) -> None:
    reducer = {"name": "token_pooling", "algorithm": algorithm, "score_from": score}
    m = zoo.wrap(backbone("plain"), reducer, {"name": "geometric", "rate": 0.8}).eval()
    ours = zoo.profile(m)
    assert ours.reducer > 0
    assert fvcore_gmacs(m, images(2)) == pytest.approx(ours.gmacs, rel=1e-6)
    assert torch_gmacs(m, images(2)) == pytest.approx(ours.gmacs, rel=1e-6)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"algorithm": "kmodes"}, "algorithm must be one of"),
        ({"centre": "median"}, "centre must be one of"),
        ({"score_from": "cls"}, "score_from must be one of"),
        ({"iterations": 0}, "iterations must be an integer of at least 1"),
        ({"iterations": True}, "iterations must be"),
    ],
)
def test_bad_arguments_are_refused(args: dict[str, Any], message: str) -> None:
    with pytest.raises(ZooError, match=message):
        create("token_pooling", **args)


# -- attention received ----------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """Size of the largest tensor that any operation returns."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else [out]:
            if isinstance(value, Tensor):
                self.size = max(self.size, value.numel())
        return out


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("n", [1, 9, 65, 197])
def test_attention_received_equals_the_map_without_holding_it(
    n: int, biased: bool, grad: bool
) -> None:
    g = torch.Generator().manual_seed(n)
    q, k = (torch.randn(6, 3, n, 16, generator=g, dtype=torch.float64) for _ in range(2))
    bias = torch.randn(6, 1, 1, n, generator=g, dtype=torch.float64) if biased else None
    logits = (q @ k.transpose(-2, -1)) * 0.3
    expected = (logits if bias is None else logits + bias).softmax(-1).mean((1, 2))
    with torch.set_grad_enabled(grad), Largest() as seen:
        got = column_mean(q.requires_grad_(grad), k.requires_grad_(grad), 0.3, bias)
    assert torch.allclose(got, expected)
    if n > 60:
        assert seen.size < 6 * 3 * n * n / 3


def test_gradient_of_attention_received() -> None:
    q, k = (torch.randn(2, 2, 21, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    aim = torch.randn(2, 21, dtype=torch.float64)
    (column_mean(q, k, 0.5) * aim).sum().backward()
    ours = q.grad, k.grad
    q.grad = k.grad = None
    (((q @ k.transpose(-2, -1)) * 0.5).softmax(-1).mean((1, 2)) * aim).sum().backward()
    assert torch.allclose(ours[0], q.grad) and torch.allclose(ours[1], k.grad)


# -- schedules -------------------------------------------------------------------------------------


def counts(schedule: Geometric, depth: int, n0: int) -> list[int]:
    found = [schedule.budget(b, depth, n0, n0) for b in range(depth)]
    return [n0 if f is None else f.keep for f in found]


def test_geometric_counts() -> None:
    assert counts(Geometric(0.5), 4, 100) == [50, 25, 12, 6]
    assert counts(Geometric(0.5, blocks=[1, 3]), 4, 100) == [100, 50, 100, 25]
    assert counts(Geometric(0.1), 4, 100) == [10, 1, 1, 1]
    assert counts(Geometric(0.5), 12, 196)[:4] == [98, 49, 24, 12]
    assert counts(Geometric(1.0), 3, 10) == [10, 10, 10]
    with pytest.raises(ZooError, match="lists belong to keep_rate"):
        Geometric([0.5, 0.4])  # type: ignore[arg-type]
    with pytest.raises(ZooError, match=r"must be in \(0, 1\]"):
        Geometric(0.0)
    schedule = Geometric(0.8, blocks=[2])
    assert zoo.wrap(backbone("plain"), "topk", schedule.config()).schedule == schedule


def deit(size: str) -> torch.nn.Module:
    with hollow():
        return timm.create_model(f"deit_{size}_patch16_224")


@pytest.mark.parametrize(
    ("size", "gmacs", "rate"),
    [("tiny", 0.73, 0.891), ("small", 2.3, 0.859), ("small", 3.0, 0.916), ("base", 8.8, 0.861)],
)
def test_the_rate_is_solved_for_a_cost(size: str, gmacs: float, rate: float) -> None:
    """Against rates that were solved elsewhere, for a clustering whose weights cost nothing."""
    reducer = {"name": "token_pooling", "score_from": "none"}
    m = zoo.wrap(deit(size), reducer, {"name": "target_gmacs", "gmacs": gmacs})
    assert isinstance(m.schedule, Geometric)
    assert m.schedule.rate == pytest.approx(rate, abs=2e-3)
    assert 0.995 * gmacs < zoo.profile(m).gmacs <= gmacs


def test_chosen_blocks_are_solved_too() -> None:
    schedule = {"name": "target_gmacs", "gmacs": 2.6, "blocks": [2, 5, 8], "family": "geometric"}
    m = zoo.wrap(deit("small"), {"name": "token_pooling", "score_from": "none"}, schedule)
    assert m.schedule.rate == pytest.approx(0.628, abs=4e-3)
    fewer = {(a, b) for a, b in m.token_counts() if a != b}
    assert len(fewer) == 3


def test_every_method_takes_the_geometric_family() -> None:
    dense = zoo.profile(backbone("plain")).gmacs
    schedule = {"name": "target_gmacs", "fraction": 0.6, "family": "geometric"}
    for name in ("topk", "tome"):
        m = zoo.wrap(backbone("plain"), name, schedule)
        assert 0.5 * dense < zoo.profile(m).gmacs <= 0.6 * dense


# -- the public variant ----------------------------------------------------------------------------


def slow_haurum(distance: Tensor, weight: Tensor, k: int, n: int) -> tuple[list[int], list[int]]:
    """One image of the public code's algorithm, by loops."""
    medoids = weight.argsort(descending=True, stable=True)[:k].tolist()
    total = distance.sum(1)

    def nearest() -> list[int]:
        return [int(distance[medoids, i].argmin()) for i in range(len(distance))]

    for _ in range(n):
        slot = nearest()
        for c in range(k):
            cost = [
                float(weight[i] * total[i]) if slot[i] == c else float("inf")
                for i in range(len(distance))
            ]
            medoids[c] = cost.index(min(cost))
    return medoids, nearest()


def test_the_public_variant_equals_a_loop() -> None:
    t, s = tokens(30)
    out = create("kmedoids_haurum", iterations=4).reduce(t, s, STEP)
    distance = torch.cdist(t.patches, t.patches)
    for b in range(2):
        medoids, slot = slow_haurum(distance[b], s.column[b, 1:], 9, 4)
        assert out.origin[b].tolist() == medoids and out.source[b].tolist() == slot
        assert torch.equal(out.patches[b], t.patches[b, medoids])


def test_the_public_variant_takes_token_zero_for_empty_clusters() -> None:
    t, s = tokens(20)
    x = t.x.clone()
    x[:, 5:] = x[:, 5:6]
    weight = torch.linspace(0.1, 2, 21).expand(2, -1)
    out = create("kmedoids_haurum").reduce(t._replace(x=x), s._replace(column=weight), STEP)
    assert (out.origin == 0).sum(1).min() > 1
    assert out.size.sum(1).tolist() == [21, 21]


def test_the_public_variant_undoes_its_start() -> None:
    """Each of its updates makes the error larger than that of the tokens it starts from."""
    x, w = (v.float() for v in points(4, 196, 32))
    t = Tokens.start(torch.cat([x[:, :1], x], 1), 1, track=True)
    s = Signals(column=torch.cat([w[:, :1], w], 1))
    distance = squared_distances(x)
    for k in (98, 49):
        start = kmedoids(distance, heaviest(w, k), w, 0)
        ours = kmedoids(distance, start.leader, w)
        keep = create("kmedoids_haurum").assign(t, s, Step(1, 4, Budget(k), (14, 14)))
        theirs = medoid_error(distance, Clusters(keep.index, keep.slot), w)
        first = medoid_error(distance, start, w)
        assert (medoid_error(distance, ours, w) <= first).all() and (first < theirs).all()


def test_the_public_variant_refuses_the_first_block() -> None:
    with pytest.raises(ZooError, match="cannot reduce in block 0"):
        zoo.wrap(backbone("plain"), "kmedoids_haurum", {"name": "constant_r", "r": 4})
    free = {"name": "kmedoids_haurum", "equal_weight": True}
    m = zoo.wrap(backbone("plain"), free, {"name": "constant_r", "r": 4}).eval()
    with torch.no_grad():
        first, again = m(images()), m(images())
    assert torch.equal(first, again)


def test_equal_weights_of_the_public_variant_start_far_apart() -> None:
    t, s = tokens(12)
    reducer: Reducer = create("kmedoids_haurum", equal_weight=True, seed=3)
    distance = squared_distances(t.patches).sqrt()
    got = reducer._far_apart(distance, STEP)
    start = reducer.first(12, STEP)
    for b in range(2):
        chosen = [start]
        while len(chosen) < 9:
            reach = distance[b, chosen].max(0).values
            chosen.append(int(reach.index_fill(0, torch.tensor(chosen), -1.0).argmax()))
        assert got[b].tolist() == chosen
    assert len({create("kmedoids_haurum", seed=i).first(12, STEP) for i in range(30)}) > 5


# -- groups without a mean -------------------------------------------------------------------------


def test_keep_with_groups() -> None:
    t = Tokens.start(torch.arange(5.0).view(1, 5, 1), 1, track=True)
    index, slot = torch.tensor([[1, 2]]), torch.tensor([[1, 0, 1, -1]])
    out = apply(t, Keep(index, slot=slot))
    assert out.x.flatten().tolist() == [0, 2, 3]
    assert out.size.tolist() == [[1, 1, 2]] and not out.unit
    assert out.source.tolist() == [[1, 0, 1, -1]] and out.origin.tolist() == [[1, 2]]
    # Padding stands for nothing.
    out = apply(t, Keep(index, torch.tensor([[True, False]]), torch.tensor([[0, 0, 0, -1]])))
    assert out.size.tolist() == [[1, 3, 0]] and out.mask.tolist() == [[True, True, False]]
    assert out.source.tolist() == [[0, 0, 0, -1]]


def test_points_far_apart_are_never_taken_twice() -> None:
    # Of three points on a line the outer two are far from everything: a greedy choice by the
    # largest distance alone would go back and forth between them.
    x = torch.tensor([[0.0], [5.0], [10.0], [4.0]]).expand(2, -1, -1)
    distance = squared_distances(x).sqrt()
    assert farthest_reach(distance, 0, 4)[0].tolist() == [0, 2, 3, 1]
    g = torch.Generator().manual_seed(0)
    distance = squared_distances(torch.randn(3, 30, 4, generator=g)).sqrt()
    for k in (1, 7, 30):
        for row, d in zip(farthest_reach(distance, 3, k).tolist(), distance, strict=True):
            chosen = [3]
            while len(chosen) < k:
                free = [j for j in range(30) if j not in chosen]
                chosen.append(max(free, key=lambda j: max(float(d[i, j]) for i in chosen)))
            assert row == chosen
