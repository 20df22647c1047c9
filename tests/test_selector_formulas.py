"""Every selector against its formulas, written down again image by image and with loops."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from reduction import Selection, select
from tests.selector_cases import signals

GRIDS = [(6, 6), (5, 7), (4, 12)]


def one(seed: int, grid: tuple[int, int]) -> dict[str, Tensor]:
    return signals(1, grid, seed=seed)


def run(name: str, keep: Any, given: dict[str, Tensor], grid: Any, **options: Any) -> Selection:
    return select(keep=keep, method=name, grid=grid, **given, **options)


def best(score: list[float], k: int) -> list[int]:
    return sorted(range(len(score)), key=lambda i: (-score[i], i))[:k]


def cosines(x: Tensor) -> list[list[float]]:
    x = x.double()
    x = x / x.norm(dim=-1, keepdim=True)
    return (x @ x.T).tolist()


def row(given: dict[str, Tensor], name: str = "cls_row") -> list[float]:
    value = given[name]
    value = value.mean(1) if value.dim() == 3 else value
    return value[0, 1:].tolist()


@pytest.mark.parametrize(("seed", "grid"), list(itertools.product(range(3), GRIDS)))
def test_scope(seed: int, grid: tuple[int, int]) -> None:
    given = one(seed, grid)
    s, n = cosines(given["features"][0]), grid[0] * grid[1]
    weight = given["cls_row"].sum(1)[0, 1:].tolist()
    for combine, alpha in (("product", 1.0), ("add", 0.5)):
        covered, chosen, gains = [0.0] * n, [], []
        for _ in range(9):
            gain = [sum(max(0.0, s[i][j] - covered[i]) for i in range(n)) for j in range(n)]
            power = [w**alpha for w in weight]
            both = list(zip(gain, power, strict=True))
            score = [g * p if combine == "product" else g + p for g, p in both]
            j = best([v if i not in chosen else -1e9 for i, v in enumerate(score)], 1)[0]
            chosen.append(j)
            gains.append(gain[j])
            covered = [max(covered[i], s[i][j]) for i in range(n)]
        got = run("scope", 9, given, grid, combine=combine, alpha=alpha)
        assert got.order[0].tolist() == chosen


def test_scope_without_saliency_gains_less_in_every_step() -> None:
    x = signals(1)["features"]
    s = torch.tensor(cosines(x[0]))
    covered, last = torch.zeros(36, dtype=torch.float64), math.inf
    for j in select(x, 20, "scope").order[0].tolist():
        gain = float((s[:, j] - covered).clamp_min(0).sum())
        assert gain <= last + 1e-6
        covered, last = torch.maximum(covered, s[:, j]), gain


@pytest.mark.parametrize(("seed", "grid"), list(itertools.product(range(3), GRIDS)))
@pytest.mark.parametrize("objective", [min, sum])
def test_divprune(seed: int, grid: tuple[int, int], objective: Any) -> None:
    given = one(seed, grid)
    s, n = cosines(given["features"][0]), grid[0] * grid[1]
    alone = [min(1 - s[i][j] for j in range(n) if j != i) for i in range(n)]
    chosen = best(alone, 1)
    while len(chosen) < 11:
        gap = [objective([1 - s[i][j] for j in chosen]) for i in range(n)]
        chosen += best([-1.0 if i in chosen else gap[i] for i in range(n)], 1)
    got = run("divprune", 11, given, grid, objective=objective.__name__)
    assert got.order[0].tolist() == chosen


def test_divprune_is_within_its_bound_of_the_best_radius() -> None:
    x = torch.randn(1, 9, 4, generator=torch.Generator().manual_seed(3))
    d = 1 - torch.tensor(cosines(x[0]))

    def radius(kept: Any) -> float:
        return float(d[:, list(kept)].amin(1).max())

    optimum = min(radius(kept) for kept in itertools.combinations(range(9), 3))
    assert radius(select(x, 3, "divprune").order[0].tolist()) <= 4 * optimum


@pytest.mark.parametrize("seed", range(4))
def test_dpp_takes_what_raises_the_determinant_most(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    x, q = torch.randn(1, 12, 20, generator=g), torch.rand(1, 12, generator=g) + 0.1
    for quality in (q, torch.ones_like(q)):
        kernel = quality[0].double().outer(quality[0].double()) * torch.tensor(cosines(x[0]))
        chosen: list[int] = []
        for _ in range(6):
            volumes = [
                -1.0
                if j in chosen
                else float(torch.det(kernel[[*chosen, j]][:, [*chosen, j]])) * (1 + 1e-9 * (j == 0))
                for j in range(12)
            ]
            chosen.append(best([round(v, 9) for v in volumes], 1)[0])
        extra = {} if quality is not q else {"quality": quality}
        assert select(x, 6, "dpp", **extra).order[0].tolist() == chosen


@pytest.mark.parametrize(("seed", "grid"), list(itertools.product(range(3), GRIDS)))
@pytest.mark.parametrize("official", [False, True])
def test_hiprune(seed: int, grid: tuple[int, int], official: bool) -> None:
    given = one(seed, grid)
    rows, columns = grid
    n, keep, alpha = rows * columns, 15, 0.7
    anchors = best(row(given, "column_shallow"), round(keep * alpha / 5))
    near = set(anchors)
    for i in anchors:
        r, c = divmod(i, columns)
        if official:
            near |= {min(max(i + m, 0), n - 1) for m in (-1, 1, -columns, columns)}
        else:
            cross = ((r, c - 1), (r, c + 1), (r - 1, c), (r + 1, c))
            near |= {y * columns + z for y, z in cross if 0 <= y < rows and 0 <= z < columns}
    deep = row(given, "column")
    expected = near | set([i for i in best(deep, n) if i not in near][: keep - len(near)])
    compat = "official" if official else None
    got = run("hiprune", keep, given, grid, alpha=alpha, compat=compat)
    assert got.indices[0].tolist() == sorted(expected)


@pytest.mark.parametrize(("seed", "grid"), list(itertools.product(range(3), [(6, 6), (4, 12)])))
def test_vscan_with_windows_that_fit(seed: int, grid: tuple[int, int]) -> None:
    given = one(seed, grid)
    a, deep, columns = row(given, "cls_row_shallow"), row(given), grid[1]
    keep, side = 21, 2
    windows: dict[tuple[int, int], list[int]] = {}
    for i in range(len(a)):
        windows.setdefault((i // columns // side, i % columns // side), []).append(i)
    each = int(keep * 0.5) // len(windows)
    chosen = [w[j] for w in windows.values() for j in best([a[i] for i in w], each)]
    chosen += [i for i in best(deep, len(a)) if i not in chosen][: keep - len(chosen)]
    check_merged(run("vscan", keep, given, grid, window=side), given, sorted(chosen))


@pytest.mark.parametrize(("seed", "grid"), list(itertools.product(range(3), [(9, 10), (5, 7)])))
def test_vscan_with_ragged_windows(seed: int, grid: tuple[int, int]) -> None:
    given = one(seed, grid)
    a, deep = row(given, "cls_row_shallow"), row(given)
    down, across = max(1, grid[0] // 4), max(1, grid[1] // 4)
    keep = 20
    budget, taken, chosen = keep // 2, {}, []
    cap = math.ceil(budget / (down * across))
    for i in best(a, len(a)):
        r, c = divmod(i, grid[1])
        window = (min(r // 4, down - 1), min(c // 4, across - 1))
        if taken.get(window, 0) < cap and len(chosen) < budget:
            taken[window] = taken.get(window, 0) + 1
            chosen.append(i)
    chosen += [i for i in best(deep, len(a)) if i not in chosen][: keep - len(chosen)]
    check_merged(run("vscan", keep, given, grid), given, sorted(chosen))


def check_merged(
    got: Selection,
    given: dict[str, Tensor],
    kept: list[int],
    heads: list[int] | None = None,
) -> None:
    """Every other patch is averaged into the kept one most like it."""
    assert got.indices[0].tolist() == kept
    x = given["features"][0]
    s = cosines(x)
    members = {i: [i] for i in kept}
    for i in range(len(x)):
        if i not in members:
            goal = max(sorted(heads or kept), key=lambda j: s[i][j])
            members[goal].append(i)
            assert got.slot[0, i] == kept.index(goal)
    for m, i in enumerate(kept):
        assert torch.allclose(got.features[0, m], x[members[i]].mean(0), atol=1e-5)


@pytest.mark.parametrize(("seed", "grid"), list(itertools.product(range(3), GRIDS)))
def test_apet(seed: int, grid: tuple[int, int]) -> None:
    given = one(seed, grid)
    x = given["features"][0].double()
    basis = [int(x.norm(dim=-1).argmax())]
    while len(basis) < 4:
        gaps = [min(float((x[i] - x[b]).square().sum()) for b in basis) for i in range(len(x))]
        basis += best(gaps, 1)
    b = x[basis]
    w = torch.linalg.solve(b @ b.T + 0.1 * torch.eye(4).double(), b @ x.T)
    error = (x - w.T @ b).norm(dim=-1).tolist()
    heads = [i for i in best(error, len(x)) if i not in basis][:8]
    got = run("apet", 12, given, grid, basis=4, ridge=0.1)
    assert got.order[0, 4:].tolist() == heads
    check_merged(got, given, sorted(basis + heads), heads)
    started = run("apet", 12, {**given, "start": torch.tensor([5])}, grid, basis=4)
    assert 5 in started.indices[0].tolist()


@pytest.mark.parametrize(("seed", "grid"), list(itertools.product(range(3), GRIDS)))
def test_dart(seed: int, grid: tuple[int, int]) -> None:
    given = one(seed, grid)
    s = cosines(given["features"][0])
    keys = given["k"][0, :, 1:].abs().sum((0, 2)).tolist()
    pivots = best(keys, 3)
    chosen = list(pivots)
    for p, pivot in enumerate(pivots):
        free = [i for i in range(len(keys)) if i not in chosen]
        chosen += sorted(free, key=lambda i: (s[pivot][i], i))[: 11 // 3 + (p < 11 % 3)]
    assert run("dart", 14, given, grid, pivots=3).order[0].tolist() == chosen


@pytest.mark.parametrize(("seed", "grid"), list(itertools.product(range(3), GRIDS)))
@pytest.mark.parametrize("share", [0.0, 0.5, 0.8])
def test_vispruner(seed: int, grid: tuple[int, int], share: float) -> None:
    given = one(seed, grid)
    s, a = cosines(given["features"][0]), row(given)
    order, keep = best(a, len(a)), 11
    important = int(keep * share)
    rest, wanted = order[important:], keep - important
    while len(rest) > wanted:
        even, odd = rest[::2], rest[1::2]
        out = min(3, len(rest) - wanted, len(even))
        like = [max(s[i][j] for j in odd) for i in even]
        rest = [even[i] for i in best(like, len(even))[out:]] + odd
    got = run("vispruner", keep, given, grid, important=share, per_round=3)
    assert got.order[0].tolist() == order[:important] + rest


@pytest.mark.parametrize(("seed", "grid"), list(itertools.product(range(3), GRIDS)))
@pytest.mark.parametrize("weights", ["raw", "normalised"])
@pytest.mark.parametrize("plus", [False, True])
def test_prumerge(seed: int, grid: tuple[int, int], weights: str, plus: bool) -> None:
    given = one(seed, grid)
    x = given["features"][0].double()
    q, k = (given[s][0].transpose(0, 1).flatten(1).double() for s in ("q", "k"))
    a = ((k @ q[0]) / math.sqrt(k.shape[1])).softmax(0)[1:]
    like, n, limit = cosines(k[1:]), len(x), 12
    t = round(limit / 4) if plus else limit
    chosen = best(a.tolist(), t)
    rest = [i for i in range(n) if i not in chosen]
    chosen += [rest[j * len(rest) // (limit - t)] for j in range(limit - t)]
    expected = {}
    for i in chosen:
        near = best([like[i][j] if j != i else -9 for j in range(n)], 5)
        merged = sum((a[j] * x[j] for j in near), torch.zeros_like(x[0]))
        total = a[i] + sum(a[j] for j in near)
        expected[i] = x[i] + merged if weights == "raw" else (a[i] * x[i] + merged) / total
    options: dict[str, Any] = {"neighbours": 5, "weights": weights, "extras": True}
    got = run("prumerge_plus" if plus else "prumerge", limit + 1, given, grid, **options)
    assert got.indices[0].tolist() == [*sorted(chosen), -1]
    for m, i in enumerate(sorted(chosen)):
        assert torch.allclose(got.features[0, m].double(), expected[i], atol=1e-5)
    left = [j for j in range(n) if j not in chosen]
    z = sum((a[j] * x[j] for j in left), torch.zeros_like(x[0]))
    z = z if weights == "raw" else z / a[left].sum()
    assert torch.allclose(got.features[0, -1].double(), z, atol=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_adaptive_prumerge_keeps_what_stands_out_of_its_own_image(seed: int) -> None:
    given = signals(3, (10, 10), seed=seed)
    given["q"] *= 2
    found = select(keep=60, method="prumerge", adaptive=True, **given)
    for i in range(3):
        q, k = (given[s][i].transpose(0, 1).flatten(1) for s in ("q", "k"))
        a = ((k @ q[0]) / math.sqrt(k.shape[1])).softmax(0)[1:]
        low, high = torch.quantile(a, torch.tensor([0.25, 0.75]))
        count = max(1, int((a > high + 1.5 * (high - low)).sum()))
        assert found.valid[i] == count
        assert found.order[i, :count].tolist() == best(a.tolist(), count)


@pytest.mark.parametrize(("seed", "grid"), list(itertools.product(range(3), GRIDS)))
def test_holov(seed: int, grid: tuple[int, int]) -> None:
    given = one(seed, grid)
    a = row(given)
    n, keep, m = len(a), 20, 5
    sizes = [n // m + (p < n % m) for p in range(m)]
    starts = [sum(sizes[:p]) for p in range(m)]
    means = [sum(a[b : b + z]) / z for b, z in zip(starts, sizes, strict=True)]
    share = [v / sum(means) for v in means]
    budget = [math.floor(w * keep) for w in share]
    for p in best(share, keep - sum(budget)):
        budget[p] += 1
    chosen = [
        b + j
        for b, z, k in zip(starts, sizes, budget, strict=True)
        for j in best(a[b : b + z], min(k, z))
    ]
    chosen += [i for i in best(a, n) if i not in chosen][: keep - len(chosen)]
    assert run("holov", keep, given, grid, segments=m).indices[0].tolist() == sorted(chosen)


@pytest.mark.parametrize("seed", range(6))
def test_crops_are_served_by_the_largest_remainders(seed: int) -> None:
    given = signals(5, (6, 6), seed=seed)
    total = int(5 * 36 * 0.22)
    full = int(total * 0.5)
    rest = total - full
    hot = best(given["cls_row_shallow"].sum(1)[0, 1:].tolist(), 18)
    found = [0] * 4
    for i in hot:
        found[i // 6 // 3 * 2 + i % 6 // 3] += 1
    quota = [f / len(hot) * rest for f in found]
    counts = [int(v) for v in quota]
    for p in best([v - int(v) for v in quota], rest - sum(counts)):
        counts[p] += 1
    got = select(keep=0.22, method="hired", crops=[2, 2], **given)
    assert got.valid.tolist() == [full, *counts]
    for i, count in enumerate(got.valid.tolist()):
        a = given["cls_row"].sum(1)[i, 1:].tolist()
        assert got.indices[i, :count].tolist() == sorted(best(a, count))


@pytest.mark.parametrize(("seed", "keep"), list(itertools.product(range(4), (12, 17, 30))))
def test_prunesid(seed: int, keep: int) -> None:
    given = one(seed, (6, 6))
    x = given["features"][0].double()
    n, groups = 36, keep // 4
    a = x.sigmoid()
    a = (a - a.mean(1, keepdim=True)).T
    v = torch.linalg.svd(a, full_matrices=False).Vh[:groups]
    group = v.abs().argmax(0).tolist()
    s, attention = cosines(x), given["cls_row"].sum(1)[0, 1:].tolist()
    mu = sum(s[i][j] for i in range(n) for j in range(i)) / (n * (n - 1) / 2)
    ranked: list[list[int]] = []
    found = []
    for g in range(groups):
        line = [i for i in best(attention, n) if group[i] == g]
        held: list[int] = []
        for i in line:
            if all(s[i][j] <= keep / 32 * mu for j in held):
                held.append(i)
        found.append(len(held))
        ranked.append(held + [i for i in line if i not in held])
    sizes = [len(r) for r in ranked]
    low = [min(1, z) for z in sizes]
    high = [min(5 * math.ceil(keep / 64), z, f) for z, f in zip(sizes, found, strict=True)]
    while sum(high) < keep:
        high = [min(h + 1, z) for h, z in zip(high, sizes, strict=True)]
    other = keep - sum(low)
    upto = [round(sum(found[: g + 1]) / sum(found) * other) for g in range(groups)]
    given_out = [u - (upto[g - 1] if g else 0) for g, u in enumerate(upto)]
    t = [min(d + lo, hi) for d, lo, hi in zip(given_out, low, high, strict=True)]
    for g in best([float(f) for f in found], groups):
        t[g] += min(high[g] - t[g], keep - sum(t))
    expected = [i for g in range(groups) for i in ranked[g][: t[g]]]
    got = run("prunesid", keep, given, (6, 6))
    assert got.order[0].tolist() == expected
    handed = run("prunesid", keep, {**given, "groups": torch.tensor([group])}, (6, 6))
    assert torch.equal(handed.order, got.order)


def test_moving_the_patches_moves_the_choice_with_them() -> None:
    given = signals(2, (6, 6), seed=1)
    order = torch.randperm(36, generator=torch.Generator().manual_seed(0))
    moved = dict(given)
    moved["features"] = given["features"][:, order]
    rows = torch.cat([torch.zeros(1, dtype=torch.int64), order + 1])
    moved |= {k: v[..., rows] for k, v in given.items() if k.startswith(("cls", "col"))}
    moved |= {k: given[k][:, :, rows] for k in ("q", "k")}
    stay = ("fastervlm", "vispruner", "scope", "divprune", "dpp", "dart", "apet", "prunesid")
    for name in (*stay, "prumerge", "hired"):
        quality = {"quality": row_of(given)} if name == "dpp" else {}
        other = {"quality": row_of(moved)} if name == "dpp" else {}
        a = select(keep=10, method=name, **given, **quality)
        b = select(keep=10, method=name, **moved, **other)
        assert torch.equal(order[b.order], a.order), name


def row_of(given: dict[str, Tensor]) -> Tensor:
    return given["cls_row"].mean(1)[:, 1:]


def test_cosine_methods_do_not_see_the_length_of_features() -> None:
    given = signals(2, (6, 6), seed=2)
    longer = {**given, "features": given["features"] * 8}
    for name in ("scope", "divprune", "dpp", "vispruner", "dart", "vscan", "apet"):
        a, b = (select(keep=10, method=name, **g) for g in (given, longer))
        assert torch.equal(a.order, b.order), name
