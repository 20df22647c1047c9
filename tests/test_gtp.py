"""GTP: the graph, what is handed on, importance, ties."""

from __future__ import annotations

import pytest
import torch

import reduction
import zoo
from reduction.functional.graphs import neighbour_graph, semantic_neighbours, spatial_neighbours
from reduction.methods.gtp import SELECTIONS, importance
from reduction.tokens import Tokens
from tests.cases import backbone, images
from zoo.errors import ZooError

R8 = {"name": "constant_r", "r": 8}


def test_spatial_neighbours_by_hand() -> None:
    assert spatial_neighbours((3, 3)).sum(1).tolist() == [3, 5, 3, 5, 8, 5, 3, 5, 3]
    near = spatial_neighbours((2, 4))
    assert near[0].nonzero().flatten().tolist() == [1, 4, 5]  # not 3: rows end


@pytest.mark.parametrize(("count", "spatial"), [(0, True), (3, True), (3, False)])
def test_the_graph_against_loops(count: int, spatial: bool) -> None:
    x = torch.randn(2, 12, 5)
    graph = neighbour_graph(x, (3, 4), count, spatial).expand(2, -1, -1)
    for b in range(2):
        u = x[b] / x[b].norm(dim=1, keepdim=True)
        g = torch.zeros(12, 12)
        for i in range(12):
            cos = u @ u[i]
            best = cos.argsort(descending=True)[1 : count + 1].tolist()
            for j in range(12):
                apart = max(abs(i // 4 - j // 4), abs(i % 4 - j % 4))
                g[i, j] = float((spatial and apart == 1) or j in best)
        d = g.sum(1)
        assert torch.allclose(graph[b], g / (d[:, None] * d).sqrt(), atol=1e-6)
    if not count:
        assert torch.equal(graph, graph.transpose(1, 2))


def test_a_graph_without_edges_has_no_nan() -> None:
    assert not semantic_neighbours(torch.randn(1, 4, 3), 0).any()
    assert neighbour_graph(torch.randn(1, 4, 3), (2, 2), 0, spatial=False).abs().sum() == 0
    assert torch.equal(neighbour_graph(torch.randn(1, 1, 3), (1, 1), 5), torch.zeros(1, 1, 1))
    with pytest.raises(ZooError, match="patch dropout"):
        neighbour_graph(torch.randn(1, 5, 3), (2, 2), 1)


def example(**args: object) -> tuple[Tokens, torch.Tensor, reduction.Reducer, Tokens]:
    g = torch.Generator().manual_seed(0)
    t = Tokens.start(torch.randn(2, 17, 6, generator=g), 1, track=True)
    map_ = torch.randn(2, 3, 17, 17, generator=g).softmax(-1)
    reducer = reduction.create("gtp", **args)
    t = reducer.begin(t)
    step = reduction.Step(0, 4, reduction.Budget(11), (4, 4))
    return t, map_, reducer, reducer.reduce(t, reduction.Signals(attn=map_), step)


def test_neighbours_take_their_share() -> None:
    t, map_, reducer, out = example(neighbours=3, alpha=0.2, token_scale=True)
    w = neighbour_graph(t.patches, (4, 4), 3)
    for b in range(2):
        own = torch.stack([map_[b, :, j, j].max() for j in range(1, 17)])
        received = torch.stack([map_[b, :, :, j].sum(1).max() for j in range(1, 17)])
        order = (own * received).argsort(descending=True).tolist()
        kept, left = order[:11], order[11:]
        assert sorted(out.origin[b].tolist()) == sorted(kept)
        for slot, i in enumerate(out.origin[b].tolist()):
            x = t.patches[b, i] + 0.2 * sum(w[b, i, j] * t.patches[b, j] for j in left)
            size = 1 + 0.2 * sum(w[b, i, j] for j in left)
            assert torch.allclose(out.patches[b, slot], x, atol=1e-6)
            assert torch.allclose(out.patch_size[b, slot], size)
        assert int((out.source[b] == -1).sum()) == 5
    # The next block takes a part of the same graph.
    step = reduction.Step(1, 4, reduction.Budget(8), (4, 4))
    again = reducer.reduce(out, reduction.Signals(attn=map_[..., :12, :12]), step)
    left = [i for i in out.origin[0].tolist() if i not in again.origin[0].tolist()]
    where = {i: slot for slot, i in enumerate(out.origin[0].tolist())}
    i = int(again.origin[0, 0])
    gain = 0.2 * sum(w[0, i, j] * out.patches[0, where[j]] for j in left)
    assert torch.allclose(again.patches[0, 0], out.patches[0, where[i]] + gain, atol=1e-6)


def test_a_mixed_graph_without_semantic_neighbours_is_the_spatial_one() -> None:
    mixed, spatial = example(neighbours=0)[3], example(graph="spatial")[3]
    assert torch.equal(mixed.x, spatial.x)
    assert (mixed.x - example()[3].x).abs().max() > 1e-3


def test_without_a_share_it_is_pruning() -> None:
    t, _, _, out = example(alpha=0.0)
    pruned = example(propagation="none")[3]
    assert torch.equal(out.x, pruned.x) and out.unit
    assert torch.equal(out.patches, t.patches.gather(1, out.origin.unsqueeze(2).expand(-1, -1, 6)))
    assert (example(alpha=0.3)[3].x - out.x).abs().max() > 0.01


def test_the_mean_of_what_leaves_is_appended() -> None:
    t, _, _, out = example(propagation="mean")
    assert out.n == 12
    for b in range(2):
        left = sorted(set(range(16)) - set(out.origin[b, :11].tolist()))
        assert torch.allclose(out.patches[b, 11], t.patches[b, left].mean(0), atol=1e-6)
        assert out.patch_size[b, 11] == 5


@pytest.mark.parametrize("selection", SELECTIONS)
def test_importance_against_loops(selection: str) -> None:
    map_ = torch.randn(1, 3, 7, 7).softmax(-1)
    ours = importance(selection, 2, map_, map_[:, :, 0])[0]
    kind, _, over = selection.rpartition("_")
    pool = torch.amax if over == "max" else torch.mean
    for j in range(2, 7):
        a = map_[0]
        own, received = pool(a[:, j, j], 0), pool(a[:, :, j].sum(1), 0)
        u = a / a.norm(dim=2, keepdim=True)
        value = {
            "cls_attn": pool(a[:, 0, j], 0),
            "img_attn": received,
            "diag_attn": own,
            "mixed_attn": own * received,
            "sum_attn": own + received,
            "cos_sim": pool(torch.stack([-(u[h] @ u[h, j]).sum() for h in range(3)]), 0),
        }[kind]
        assert torch.allclose(ours[j - 2], value, atol=1e-6)


def test_the_order_of_patches_does_not_matter() -> None:
    reducer = {"name": "gtp", "graph": "semantic", "sparsity": 0.9, "token_scale": True}
    m = backbone("plain").double()
    wrapped, x = zoo.wrap(m, reducer, R8).eval(), images(1).double()
    with torch.no_grad():
        expected = wrapped(x)
        order = torch.randperm(64)
        tiles = x.unfold(2, 4, 4).unfold(3, 4, 4).flatten(2, 3)[:, :, order]
        tiles = tiles.view(1, 3, 8, 8, 4, 4).permute(0, 1, 2, 4, 3, 5).reshape(1, 3, 32, 32)
        m.pos_embed[:, 1:] = m.pos_embed[:, 1:][:, order].clone()
        assert (wrapped(tiles) - expected).abs().max() < 1e-10


def test_a_sparse_map_is_sparse_and_ties_are_decided() -> None:
    """With most diagonal entries zero, the full map's scores decide, not the order of rows."""
    reducer = {"name": "gtp", "graph": "semantic", "sparsity": 0.2}
    m = backbone("plain").double()
    wrapped, x = zoo.wrap(m, reducer, R8).eval(), images(1).double()
    with torch.no_grad():
        full = zoo.wrap(m, {**reducer, "sparsity": 1.0}, R8).eval()(x)
        expected = wrapped(x)
        assert (full - expected).abs().max() > 1e-3
        order = torch.arange(63, -1, -1)
        tiles = x.unfold(2, 4, 4).unfold(3, 4, 4).flatten(2, 3)[:, :, order]
        tiles = tiles.view(1, 3, 8, 8, 4, 4).permute(0, 1, 2, 4, 3, 5).reshape(1, 3, 32, 32)
        m.pos_embed[:, 1:] = m.pos_embed[:, 1:][:, order].clone()
        assert (wrapped(tiles) - expected).abs().max() < 1e-10


def test_gradient_passes_the_sparse_map() -> None:
    m = zoo.wrap(backbone("plain"), {"name": "gtp", "sparsity": 0.6}, R8)
    m(images()).sum().backward()
    grad = m.backbone.blocks[0].attn.qkv.weight.grad
    assert grad.isfinite().all() and grad.abs().max() > 0


def test_bad_arguments_are_named() -> None:
    for args, match in (
        ({"selection": "MixedAttnMax"}, "selection must be"),
        ({"graph": "none"}, "graph must be"),
        ({"propagation": "all"}, "propagation must be"),
        ({"sparsity": 0.0}, "sparsity is the share"),
        ({"neighbours": -1}, "neighbours must be"),
        ({"graph": "semantic", "neighbours": 0}, "is empty"),
    ):
        with pytest.raises(ZooError, match=match):
            reduction.create("gtp", **args)
