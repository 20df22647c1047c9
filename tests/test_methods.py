"""Properties that every method must have, on every row of the matrix."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Sequence

import pytest
import torch
from torch import nn

import reduction
import zoo
from reduction import UnreachableBudget
from reduction.tokens import Tokens
from tests.cases import ALL, METHODS, Row, backbone, images, model, refused
from tests.covering import by_turns, crossed, pairs, parts
from zoo.errors import ZooError
from zoo.model.reduced import ReducedViT
from zoo.model.stream import Info

rows = pytest.mark.parametrize("row", METHODS, ids=lambda r: r.id)
#: The same in the slow tier; in the fast one further rows of a method by turns.
first, second, third = (pytest.mark.parametrize("row", by_turns(METHODS, n)) for n in range(3))

# Tracing takes seconds: in the fast tier one half of the methods goes one way and one the other.
traced, exported = (pytest.mark.parametrize("row", parts(METHODS, part, of=6)) for part in range(2))
core = pytest.mark.parametrize(("row", "name"), pairs())


def test_every_method_has_a_row() -> None:
    assert {r.name for r in METHODS} == set(reduction.list_methods())


def test_every_card_is_complete() -> None:
    for name in reduction.list_methods():
        card = reduction.card(name)
        assert card.title and card.authors and card.kind and card.training, name
        assert (card.code is None) == (card.licence is None), name


@pytest.mark.parametrize("name", ALL)
def test_nothing_reduced_is_exactly_timm(name: str) -> None:
    m, x = backbone(name), images()
    with torch.no_grad():
        expected = m(x)
        assert (zoo.wrap(m, None).eval()(x) - expected).abs().max() == 0.0
        full = zoo.wrap(m, {"name": "random"}, {"name": "keep_rate", "rate": 1.0}).eval()
        assert (full(x) - expected).abs().max() == 0.0


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", ALL)
def test_halves_of_every_block_are_exactly_timm(name: str, fused: bool) -> None:
    """Run each block through the adapters although nothing is reduced."""
    from zoo.adapters.attention import attend
    from zoo.adapters.blocks import block_adapter
    from zoo.adapters.tower import rope_for, tower_of

    m, x = backbone(name), images()
    for block in m.blocks:
        block.attn.fused_attn = fused
    need = frozenset({"k", "v", "cls_row", "column", "x_norm"})
    with torch.no_grad():
        embedded = tower_of(m).embed(m, x)
        prefix = m.num_prefix_tokens
        t = Tokens.start(m.norm_pre(embedded.x), prefix, track=True)
        for i, block in enumerate(m.blocks):
            rope = rope_for(embedded, i, t, positions_changed=False)
            adapter = block_adapter(block)
            branch, seen = adapter.attn_branch(
                block,
                t.x,
                lambda a, y, rope=rope: attend(a, y, prefix=prefix, rope=rope, need=need),
            )
            signals = seen.signals
            ours = adapter.mlp_half(block, t.x + branch)
            theirs = block(t.x, rope=rope) if adapter.rope else block(t.x)
            assert (ours - theirs).abs().max() == 0.0
            assert torch.allclose(signals.cls_row.sum(-1), torch.ones(1), atol=1e-5)
            assert torch.allclose(signals.column.sum(-1), torch.ones(1), atol=1e-5)
            t = t._replace(x=ours)


@core
def test_runs_and_counts(row: Row, name: str) -> None:
    if refused(row, name):
        with pytest.raises(ZooError, match="class token|no one MLP"):
            model(row, name)
        return
    m, x = model(row, name), images(3)
    with torch.no_grad():
        logits, info = m(x, return_info="trace")
        assert torch.equal(m(x), logits)
    assert logits.shape == (3, 10) and logits.isfinite().all()
    assert m.token_counts() == zoo.profile(m).tokens
    check_counts(m, info)
    fewest = min(p.mlp for p in m.plan()) if row.restores else info.tokens[-1][1]
    assert row.gates or fewest < 64 + m.prefix
    assert info.size.dtype == torch.float32 and info.size.shape[1] == info.tokens[-1][1]
    assert info.source.shape == (3, 64)
    n = info.tokens[-1][1] - m.prefix
    assert info.source.max() < n and info.source.min() >= -1
    # Every slot that is not pure padding holds a patch, and prefix tokens stand for themselves.
    assert (info.size[:, : m.prefix] == 1).all()


@core
def test_an_image_does_not_depend_on_its_batch(row: Row, name: str) -> None:
    if refused(row, name):
        return
    m, x = model(row, name), images(3)
    with torch.no_grad():
        together = m(x)
        alone = torch.cat([m(x[i : i + 1]) for i in range(3)])
    assert torch.allclose(together, alone, atol=2e-5)


@first
def test_sizes_follow_the_source_map(row: Row) -> None:
    m, x = model(row), images(2)
    with torch.no_grad():
        _, info = m(x, return_info="trace")
    for t in info.trace:
        held = torch.zeros(2, t.n).scatter_add(1, t.source.clamp_min(0), (t.source >= 0).float())
        real = torch.ones_like(held) if t.mask is None else t.mask[:, t.prefix :]
        if t.unit:
            assert torch.equal(held, real.float())
        assert t.size.sum(1).max() <= 64 + t.prefix + 1e-3


@second
def test_prefix_tokens_are_never_reduced(row: Row) -> None:
    m = model(row, "registers")
    if m.reducer.site in ("attn", "input"):
        with torch.no_grad():
            _, info = m(images(), return_info="trace")
        assert all(t.prefix == 5 and (t.size[:, :5] == 1).all() for t in info.trace)
        return
    t = Tokens.start(torch.randn(2, 5 + 64, 48), 5, track=True)
    seen = {
        "k": torch.randn(2, 3, 69, 16),
        "v": torch.randn(2, 3, 69, 16),
        "cls_row": torch.randn(2, 3, 69).softmax(-1),
        "column": torch.rand(2, 69),
        "attn": torch.randn(2, 3, 69, 69).softmax(-1),
        "x_norm": torch.randn(2, 69, 48),
        "out": torch.randn(2, 3, 69, 16),
        "x_in": torch.randn(2, 69, 48),
        "x_mid": torch.randn(2, 69, 48),
        "mlp": torch.randn(2, 69, 48),
    }
    signals = reduction.Signals(**{k: v for k, v in seen.items() if k in m.reducer.needs})
    step = reduction.Step(1, 4, reduction.Budget(40), (8, 8))
    out = m.reducer.reduce(t, signals, step)
    assert torch.equal(out.x[:, :5], t.x[:, :5])
    planned = m.reducer.count(64, step)
    assert out.n == planned or (isinstance(m.reducer, reduction.Adaptive) and out.n < planned)


@third
def test_gradients_reach_every_weight(row: Row) -> None:
    m = model(row).train()
    torch.manual_seed(1)  # what is drawn may switch a whole part of a block off
    logits, info = m(images(), return_info="trace")
    loss = logits.square().mean()
    if row.own_losses:
        own = m.auxiliary_losses(info, logits, torch.tensor([0, 1]))
        loss = loss + sum(own.values())
    loss.backward()
    for name, parameter in m.named_parameters():
        if name in m.unused_parameters():
            assert parameter.grad is None or not parameter.grad.any(), name
            continue
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


@first
def test_gradient_checkpointing_changes_nothing(row: Row) -> None:
    results = []
    for enable in (False, True):
        m = model(row)
        m.set_grad_checkpointing(enable)
        logits = m(images())
        logits.square().mean().backward()
        results.append((logits, [p.grad for p in m.parameters()]))
    assert torch.equal(results[0][0], results[1][0])
    for a, b in zip(results[0][1], results[1][1], strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


@second
def test_deepcopy_and_pickle(row: Row) -> None:
    m, x = model(row), images()
    buffer = io.BytesIO()
    torch.save(m, buffer)
    buffer.seek(0)
    with torch.no_grad():
        expected = m(x)
        assert torch.equal(copy.deepcopy(m)(x), expected)
        assert torch.equal(pickle.loads(pickle.dumps(m))(x), expected)
        assert torch.equal(torch.load(buffer, weights_only=False)(x), expected)


@third
def test_bfloat16_autocast(row: Row) -> None:
    m, x = model(row), images()
    with torch.no_grad():
        expected = m(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got, info = m(x, return_info=True)
    assert info.size.dtype == torch.float32
    check_counts(m, info)
    assert got.isfinite().all()
    assert (got.float() - expected).abs().max() < 0.5 * expected.abs().max()


@first
def test_bfloat16_weights(row: Row) -> None:
    m, x = model(row).bfloat16(), images().bfloat16()
    with torch.no_grad():
        got, info = m(x, return_info=True)
    assert got.dtype == torch.bfloat16 and got.isfinite().all()
    assert info.size.dtype == torch.float32


@exported
def test_export_with_a_dynamic_batch(row: Row) -> None:
    m, x = model(row, depth=2), images(4)
    batch = torch.export.Dim("batch", min=2, max=64)
    with torch.no_grad():
        program = torch.export.export(m, (x,), dynamic_shapes={"images": {0: batch}})
        for n in (2, 7):
            y = images(n, seed=n)
            assert torch.allclose(program.module()(y), m(y), atol=1e-4)


@pytest.mark.slow
@rows
def test_compiles_as_one_graph(row: Row) -> None:
    m, x = model(row, depth=2), images()
    torch._dynamo.reset()
    with torch.no_grad():
        expected = m(x)
        got = torch.compile(m, fullgraph=True)(x)
    assert torch.allclose(got, expected, atol=1e-4)


@traced
def test_traces_as_one_graph(row: Row) -> None:
    """The fast half of compiling: one graph, run without generated code."""
    m, x = model(row, depth=2), images()
    torch._dynamo.reset()
    with torch.no_grad():
        expected = m(x)
        got = torch.compile(m, fullgraph=True, backend="eager")(x)
    assert torch.allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize(("row", "size"), crossed(METHODS, [4, 8, 12, 20], lambda n: n > 8))
def test_tiny_and_odd_grids(row: Row, size: int) -> None:
    """1, 4, 9 and 25 patches, and a budget of one token."""
    m = backbone("plain", img_size=size)
    for schedule in (dict(row.schedule) | {"strict": False}, _keep_one()):
        if schedule["name"] == "per_block" and size == 4:
            continue
        if row.frames > 1 and size == 4:
            continue  # one token: a method that acts behind a block has nothing to look at
        if (size // 4) % row.frames:
            with pytest.raises(ZooError, match="frames on top of each other"):
                zoo.wrap(m, row.reducer(), schedule).eval()(images(2, size))
            continue
        reduced = zoo.wrap(m, row.reducer(), schedule).eval()
        with torch.no_grad():
            logits, info = reduced(images(2, size), return_info=True)
        assert logits.isfinite().all()
        check_counts(reduced, info)


def check_counts(m: ReducedViT, info: Info) -> None:
    """What ran is what was planned; for adaptive methods the plan is the upper limit."""
    if isinstance(m.reducer, reduction.Adaptive):
        assert all(a <= b for a, b in zip(_flat(info.tokens), _flat(m.token_counts()), strict=True))
    else:
        assert list(info.tokens) == m.token_counts()


def _flat(pairs: Sequence[tuple[int, int]]) -> list[int]:
    return [n for pair in pairs for n in pair]


def _keep_one() -> dict[str, object]:
    return {"name": "per_block", "keep": [None, 1, None, 1], "strict": False}


@second
def test_a_rectangular_image(row: Row) -> None:
    m = backbone("plain", img_size=(24, 40))
    reduced = zoo.wrap(m, row.reducer(), dict(row.schedule)).eval()
    x = torch.randn(2, 3, 24, 40)
    with torch.no_grad():
        logits, info = reduced(x, return_info=True)
    assert info.grid == (6, 10) and info.source.shape == (2, 60)
    assert logits.isfinite().all()


@third
def test_another_image_size_at_run_time(row: Row) -> None:
    m = backbone("plain", dynamic_img_size=True)
    reduced = zoo.wrap(m, row.reducer(), {"name": "keep_rate", "rate": 0.6}).eval()
    with torch.no_grad():
        _, info = reduced(images(2, 48), return_info=True)
    early = reduced.reducer.site == "input"
    assert info.tokens[0][0] == 145 or (early and info.tokens[0][0] < 145)
    assert info.source.shape == (2, 144)


@pytest.mark.parametrize(("row", "fraction"), crossed(METHODS, [0.75, 0.5], lambda _: "share"))
def test_target_gmacs(row: Row, fraction: float) -> None:
    m = backbone("plain")
    dense = zoo.profile(m).gmacs
    schedule = {"name": "target_gmacs", "gmacs": fraction * dense}
    if fraction <= row.floor:
        with pytest.raises(UnreachableBudget, match="nearest that can be reached"):
            zoo.wrap(m, row.reducer(), schedule)
        return
    reduced = zoo.wrap(m, row.reducer(), schedule).eval()
    cost = zoo.profile(reduced)
    assert cost.gmacs <= fraction * dense
    # Whole rings of a pattern are the coarsest steps there are.
    assert cost.gmacs > (fraction - 0.12) * dense
    with torch.no_grad():
        _, info = reduced(images(), return_info=True)
    check_counts(reduced, info)


@first
def test_the_recipe_builds_the_same_model(row: Row) -> None:
    m, x = model(row), images()
    recipe = m.recipe
    again = zoo.wrap(m.unwrap(), recipe["reducer"], recipe["schedule"]).eval()
    again.load_state_dict(m.state_dict())
    with torch.no_grad():
        assert torch.equal(again(x), m(x))
    assert again.recipe == recipe


@second
def test_intermediate_maps_have_the_full_grid(row: Row) -> None:
    m = model(row)
    with torch.no_grad():
        maps = m.forward_intermediates(images(), indices=2, norm=True, intermediates_only=True)
    assert [tuple(f.shape) for f in maps] == [(2, 48, 8, 8)] * 2


def test_state_dict_keeps_timm_names() -> None:
    m = model(METHODS[0])
    names = {k.removeprefix("backbone.") for k in m.state_dict() if k.startswith("backbone.")}
    assert names == set(m.unwrap().state_dict())
    assert isinstance(m.get_classifier(), nn.Linear)
