"""The core against slow references and properties."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import reduction
from reduction import Budget, Fuse, Keep, Merge, Mix, Step, Tokens, apply, unmerge
from reduction.functional.attention import attention
from reduction.functional.carriers import append, join_tail, split_tail, trim
from reduction.functional.masking import policy_softmax
from reduction.functional.matching import bipartite_matching
from reduction.functional.received import column_mean
from reduction.tokens import SIGNALS, Signals

shapes = st.tuples(st.integers(1, 3), st.integers(0, 5), st.integers(2, 17), st.integers(0, 10**6))


def tokens(batch: int, prefix: int, n: int, seed: int, sizes: bool = True) -> Tokens:
    g = torch.Generator().manual_seed(seed)
    t = Tokens.start(
        torch.randn(batch, prefix + n, 6, generator=g, dtype=torch.float64), prefix, track=True
    )
    if sizes:
        size = torch.randint(1, 5, (batch, prefix + n), generator=g).float()
        t = t._replace(size=size, unit=False)
    return t


def test_reduction_imports_torch_only() -> None:
    code = (
        "import sys\n"
        "blocked = ('timm', 'lightning', 'hydra', 'zoo', 'torchvision', 'fvcore', 'sklearn')\n"
        "for name in blocked: sys.modules[name] = None\n"
        "import reduction\n"
        "for name in reduction.list_methods(): reduction.create(name)\n"
        "print(len(reduction.list_methods()))\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(out.stdout) == len(reduction.list_methods())


def slow_matching(metric: torch.Tensor, r: int, prefix: int) -> list[tuple[int, int]]:
    """Pairs (source, destination) of one image by plain loops."""
    n = len(metric)
    senders = [i for i in range(n) if (i + prefix) % 2 == 0]
    receivers = [i for i in range(n) if (i + prefix) % 2 == 1]
    best = []
    for i in senders:
        cosines = [
            torch.nn.functional.cosine_similarity(metric[i], metric[j], dim=0) for j in receivers
        ]
        j = max(range(len(receivers)), key=lambda j: cosines[j])
        best.append((float(cosines[j]), i, receivers[j]))
    best.sort(reverse=True)
    return [(i, j) for _, i, j in best[: min(r, n // 2)]]


@settings(max_examples=40, deadline=None)
@given(shapes, st.integers(0, 12))
def test_bipartite_matching_equals_loops(shape: tuple[int, int, int, int], r: int) -> None:
    batch, prefix, n, seed = shape
    g = torch.Generator().manual_seed(seed)
    metric = torch.randn(batch, n, 4, generator=g, dtype=torch.float64)
    match = bipartite_matching(metric, r, prefix)
    for b in range(batch):
        expected = slow_matching(metric[b], r, prefix)
        pairs = [
            (int(s), int(match.leader[b, d]))
            for s, d in zip(match.source[b], match.target[b], strict=True)
        ]
        assert pairs == expected
        everyone = sorted(match.leader[b].tolist() + match.source[b].tolist())
        assert everyone == list(range(n))


@settings(max_examples=40, deadline=None)
@given(shapes)
def test_pairs_equal_slots_equal_a_matrix(shape: tuple[int, int, int, int]) -> None:
    """Three spellings of one merge: folding, grouping, and a dense product."""
    batch, prefix, n, seed = shape
    t = tokens(batch, prefix, n, seed)
    match = bipartite_matching(t.patches, n // 3, prefix)
    pairs = apply(t, Merge(None, match.leader, pairs=(match.source, match.target)))
    m = match.leader.shape[1]
    slot = torch.empty(batch, n, dtype=torch.int64)
    slot.scatter_(1, match.leader, torch.arange(m).expand(batch, -1))
    slot.scatter_(1, match.source, match.target)
    slots = apply(t, Merge(slot, match.leader))
    one_hot = torch.nn.functional.one_hot(slot, m).transpose(1, 2).double()
    mass = (one_hot @ t.patch_size.double().unsqueeze(-1)).squeeze(-1)
    weights = one_hot * t.patch_size.double().unsqueeze(1) / mass.unsqueeze(-1)
    mixed = apply(t, Mix(weights, mass=mass.float(), leader=match.leader))
    for other in (slots, mixed):
        assert torch.allclose(pairs.x, other.x, atol=1e-6)
        assert torch.equal(pairs.size, other.size)
        assert torch.equal(pairs.origin, other.origin)
        assert torch.equal(pairs.source, other.source)
    assert torch.allclose(pairs.size.sum(1), t.size.sum(1))
    total = (t.x * t.size.double().unsqueeze(-1)).sum(1)
    assert torch.allclose((pairs.x * pairs.size.double().unsqueeze(-1)).sum(1), total, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(shapes, st.booleans())
def test_keep_then_unmerge(shape: tuple[int, int, int, int], shared: bool) -> None:
    batch, prefix, n, seed = shape
    t = tokens(batch, prefix, n, seed)
    g = torch.Generator().manual_seed(seed)
    keep = max(1, n // 2)
    index = torch.stack([torch.randperm(n, generator=g)[:keep] for _ in range(batch)])
    if shared:
        index = index[0]
    out = apply(t, Keep(index))
    back = unmerge(out, fill=-7.0)
    for b in range(batch):
        kept = set((index if shared else index[b]).tolist())
        for i in range(n):
            expected = t.patches[b, i] if i in kept else torch.full((6,), -7.0).double()
            assert torch.equal(back[b, i], expected)
    assert torch.equal(out.x[:, :prefix], t.x[:, :prefix])


def test_source_map_follows_several_steps() -> None:
    t = tokens(1, 1, 6, 0, sizes=False)
    t = apply(t, Keep(torch.tensor([[5, 3, 1, 0]])))
    assert t.source.tolist() == [[3, 2, -1, 1, -1, 0]]
    t = apply(t, Merge(torch.tensor([[0, 1, 0, 1]]), torch.tensor([[0, 1]])))
    assert t.source.tolist() == [[1, 0, -1, 1, -1, 0]]
    assert t.origin.tolist() == [[5, 3]]
    assert t.size.tolist() == [[1.0, 2.0, 2.0]]


def test_merge_can_drop_and_weigh() -> None:
    t = tokens(1, 1, 3, 0, sizes=False)
    slot, leader = torch.tensor([[0, -1, 0]]), torch.tensor([[2]])
    coef = torch.tensor([[2.0, 9.0, -1.0]], dtype=torch.float64)
    out = apply(t, Merge(slot, leader, coef=coef, mass=torch.tensor([[0.5, 9.0, 1.0]])))
    assert torch.allclose(out.patches[0, 0], 2 * t.patches[0, 0] - t.patches[0, 2])
    assert out.size.tolist() == [[1.0, 1.5]]
    assert out.source.tolist() == [[0, -1, 0]] and out.origin.tolist() == [[2]]


def test_sizes_stay_exact_in_bfloat16() -> None:
    t = Tokens.start(torch.randn(1, 513, 4).bfloat16(), 0)
    slot, leader = torch.zeros(1, 513, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.int64)
    assert apply(t, Merge(slot, leader)).size.item() == 513


def test_unmerge_needs_a_source_map() -> None:
    with pytest.raises(ValueError, match="return_info=True"):
        unmerge(Tokens.start(torch.randn(1, 4, 2), 0))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("biased", [True, False])
def test_signals_equal_the_map(fused: bool, biased: bool) -> None:
    q, k, v = (torch.randn(2, 3, 9, 4, dtype=torch.float64) for _ in range(3))
    bias = torch.rand(2, 1, 1, 9, dtype=torch.float64) if biased else None
    need = frozenset({"cls_row", "column"})
    out, s = attention(q, k, v, scale=0.5, bias=bias, fused=fused, need=need)
    logits = q @ k.transpose(-2, -1) * 0.5 + (0 if bias is None else bias)
    map_ = logits.softmax(-1)
    assert torch.allclose(out, map_ @ v)
    assert torch.allclose(s.cls_row, map_[:, :, 0])
    assert torch.allclose(s.column, map_.mean((1, 2)))
    with torch.no_grad():
        assert torch.allclose(column_mean(q, k, 0.5, bias), map_.mean((1, 2)))


def test_policy_softmax() -> None:
    logits = torch.randn(2, 3, 5, 5)
    ones = policy_softmax(logits, torch.ones(2, 5))
    assert torch.allclose(ones, logits.softmax(-1), atol=1e-5)
    policy = torch.tensor([[1.0, 1, 0, 1, 0]]).expand(2, -1).clone().requires_grad_()
    masked = policy_softmax(logits, policy)
    assert masked[:, :, 0, 2].max() < 1e-5 and masked[:, :, 2, 2].min() > 1e-4
    assert torch.allclose(masked.sum(-1), torch.ones(()), atol=1e-5)
    masked.square().sum().backward()
    assert policy.grad.isfinite().all() and policy.grad.abs().max() > 0


def test_a_step_is_plain_integers() -> None:
    step = Step(2, 12, Budget(10), (14, 14))
    assert step.keep == 10 and step.budget.prune is None


class TestRegistry:
    def test_names_are_checked(self) -> None:
        with pytest.raises(ValueError, match="token_pooling"):
            reduction.register("Bad Name")
        with pytest.raises(ValueError, match="card"):
            reduction.register("no_card_here")(type("NoCard", (reduction.Reducer,), {}))
        with pytest.raises(ValueError, match="already belongs"):
            other = type("Other", (reduction.Reducer,), {"card": reduction.card("tome")})
            reduction.register("tome")(other)

    def test_an_unknown_method_names_the_nearest(self) -> None:
        with pytest.raises(reduction.UnknownName, match="tome"):
            reduction.create("tom")

    def test_an_unknown_argument_names_the_known(self) -> None:
        with pytest.raises(reduction.ZooError, match=r"metrik.*metric"):
            reduction.create("tome", metrik="key")

    @pytest.mark.parametrize(
        ("name", "args"),
        [
            ("tome", {"metric": "value"}),
            ("topk", {"score_from": "clas"}),
            ("evit", {"fuse": "yes"}),
            ("heuristic", {"pattern": "l3"}),
        ],
    )
    def test_bad_values_are_refused(self, name: str, args: dict[str, object]) -> None:
        with pytest.raises(reduction.ZooError, match="must be"):
            reduction.create(name, **args)

    def test_a_method_from_outside(self) -> None:
        @reduction.register("toy_norm")
        class ToyNorm(reduction.ScoreReducer):
            card = reduction.card("random")

            def score(self, t, s, step):  # type: ignore[no-untyped-def]
                return t.patches.norm(dim=-1)

        try:
            assert "toy_norm" in reduction.list_methods()
            built = reduction.create("toy_norm")
            t = tokens(2, 1, 8, 0)
            out = built.reduce(t, reduction.Signals(), Step(0, 2, Budget(3), (2, 4)))
            longest = t.patches.norm(dim=-1).topk(3).values.sort().values
            assert torch.allclose(out.patches.norm(dim=-1).sort().values, longest)
        finally:
            from reduction import registry

            del registry.METHODS.classes["toy_norm"]


def test_whatever_moves_tokens_breaks_the_raster() -> None:
    t = Tokens.start(torch.randn(2, 7, 5), prefix=1, track=True, grid=(2, 3))
    assert t.grid == (2, 3) and Tokens.start(t.x, 1).grid is None
    order = torch.arange(6).expand(2, -1)
    answers = [
        Keep(order[:, :4]),
        Merge(order % 3, order[:, :3]),
        Merge(None, order[:, :4], pairs=(order[:, 4:], order[:, :2])),
        Mix(torch.rand(3, 6)),
        Fuse(order[:, :4], torch.rand(2, 6)),
    ]
    assert [apply(t, a).grid for a in answers] == [None] * 5


def test_appended_tokens_stand_behind_the_raster() -> None:
    t = append(Tokens.start(torch.randn(2, 7, 5), prefix=1, grid=(2, 3)), torch.randn(2, 2, 5))
    body, rest = split_tail(t, 2)
    assert (t.grid, body.grid, rest.grid) == ((2, 3), (2, 3), None)
    assert join_tail(body, rest).grid == (2, 3)
    assert join_tail(apply(body, Keep(torch.arange(3))), rest).grid is None


def test_every_signal_is_trimmed() -> None:
    shape = {"column": (2, 7), "cls_row": (2, 3, 7), "attn": (2, 3, 7, 7)}
    shape |= dict.fromkeys(("x_norm", "x_in", "x_mid", "mlp"), (2, 7, 6))
    shape |= dict.fromkeys(("k", "v", "out"), (2, 3, 7, 2))
    assert set(shape) == SIGNALS
    whole = Signals(**{name: torch.randn(size) for name, size in shape.items()})
    for name, x in trim(whole, 5)._asdict().items():
        want = [5 if length == 7 else length for length in shape[name]]
        assert list(x.shape) == want, name
    assert trim(Signals(), 5) == Signals()
