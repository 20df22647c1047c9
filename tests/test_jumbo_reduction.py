"""Reducers on a Jumbo: the J slots stay first and together, and the head weighs what is merged."""

from __future__ import annotations

import pytest
import torch

import zoo
from reduction.counts import Dims
from reduction.tokens import Tokens
from tests.cases import METHODS, Row, backbone, images, model, refused
from tests.test_jumbo import make, pictures
from tests.test_metamorphic import two_textures
from zoo.adapters.attention import attend
from zoo.adapters.heads import head
from zoo.adapters.hollow import hollow
from zoo.adapters.tower import class_tokens
from zoo.cost.counters import fvcore_gmacs, torch_gmacs
from zoo.model.stream import flow

REDUCERS = ["tome", "topk", "evit", "random", "heuristic"]
NOTHING = {
    "r=0": {"name": "constant_r", "r": 0},
    "rate=1": {"name": "keep_rate", "rate": 1.0},
}


@pytest.mark.parametrize("schedule", NOTHING)
@pytest.mark.parametrize("reducer", REDUCERS)
@pytest.mark.parametrize("kind", ["shared", "unshared", "none", "lora"])
def test_nothing_reduced_is_exactly_the_model(kind: str, reducer: str, schedule: str) -> None:
    m, x = make(kind), pictures()
    wrapped = zoo.wrap(m, reducer, NOTHING[schedule]).eval()
    with torch.no_grad():
        assert (wrapped(x) - m(x)).abs().max() == 0.0
    assert wrapped.verify(x) == 0.0


@pytest.mark.parametrize("reducer", REDUCERS)
@pytest.mark.parametrize("kind", ["shared", "unshared", "none", "lora"])
def test_reducers_work_with_every_kind_and_are_counted(kind: str, reducer: str) -> None:
    m = zoo.wrap(make(kind), reducer, {"name": "keep_rate", "rate": 0.6}).eval()
    x = pictures()
    with torch.no_grad():
        logits, info = m(x, return_info="trace")
        dense = m.unwrap()(x)
    assert logits.isfinite().all() and not torch.equal(logits, dense)
    assert list(info.tokens) == m.token_counts() and info.tokens[-1][1] < 68
    assert all(t.prefix == 4 and (t.size[:, :4] == 1).all() for t in info.trace)
    ours = zoo.profile(m).gmacs
    assert fvcore_gmacs(m, x) == pytest.approx(ours, rel=1e-5)
    assert torch_gmacs(m, x) == pytest.approx(ours, rel=1e-5)


def test_reducing_saves_patches_but_never_the_wide_mlp() -> None:
    with hollow():
        m = zoo.create_model("jumbo_small_patch16_224")
        reduced = zoo.wrap(m.unwrap(), "tome", {"name": "constant_r", "r": 13})
    dense, cost = zoo.profile(m), zoo.profile(reduced)
    assert cost.tokens[0] == (202, 189) and cost.tokens[-1] == (59, 46)
    wide = 8 * (6 * 384) ** 2
    for before, after in zip(dense.blocks, cost.blocks, strict=True):
        left = after.tokens_mid - 6
        assert after.mlp == wide + 8 * left * 384**2
        assert before.mlp == wide + 8 * 196 * 384**2


@pytest.mark.parametrize("fused", [True, False])
def test_the_class_row_is_the_mean_over_the_slots(fused: bool) -> None:
    m, x = make(), pictures()
    assert class_tokens(m) == 4 and class_tokens(backbone("registers")) == 1
    assert class_tokens(backbone("gap")) == 0
    attn = m.blocks[0].attn
    attn.fused_attn = fused
    y = torch.randn(2, 68, 48)
    need = frozenset({"cls_row", "attn"})
    with torch.no_grad():
        _, whole = attend(attn, y, prefix=4, need=need, class_tokens=4)
        _, alone = attend(attn, y, prefix=4, need=frozenset({"cls_row"}), class_tokens=4)
        expected = whole.signals.attn[:, :, :4].mean(2)
        assert torch.allclose(whole.signals.cls_row, expected, atol=1e-6)
        assert torch.allclose(alone.signals.cls_row, expected, atol=1e-6)
        # Top-K keeps the patches that all slots together look at most.
        kept = zoo.wrap(m, "topk", {"name": "keep_rate", "rate": 0.5, "blocks": [0]}).eval()
        _, info = kept(x, return_info="trace")
        tokens = m._pos_embed(m.patch_embed(x))
        q, k, _ = (
            attn.qkv(m.blocks[0].norm1(tokens)).unflatten(2, (3, 3, 16)).permute(2, 0, 3, 1, 4)
        )
        rows = (q[:, :, :4] @ k.transpose(2, 3) / 4).softmax(-1).mean((1, 2))[:, 4:]
        best = rows.topk(32).indices.sort().values
        ours = (info.source >= 0).nonzero()[:, 1].view(2, 32)
    assert torch.equal(ours, best)


def test_the_class_row_costs_one_row_per_slot() -> None:
    m = zoo.wrap(make(), "topk", {"name": "keep_rate", "rate": 0.5, "blocks": [1]})
    assert [b.reducer for b in zoo.profile(m).blocks] == [0, 4 * 68 * 48, 0]
    assert m.reducer.macs(64, 4, None, Dims(48, 3, 16)) == 0


def test_merging_duplicates_changes_nothing() -> None:
    """Without positions an image of two textures has two kinds of patches."""
    m, x = backbone("jumbo").double(), two_textures()
    with torch.no_grad():
        m.pos_embed[:] = m.pos_embed[:, :1]
    reduced = zoo.wrap(m, "tome", {"name": "constant_r", "r": 12}).eval()
    with torch.no_grad():
        logits, info = reduced(x, return_info=True)
        assert info.tokens[-1][1] == 64 - 4 * 12 + 3 and info.size.max() > 2
        assert (logits - m(x)).abs().max() < 1e-10


def test_the_head_weighs_patches_by_size_and_leaves_padding_out() -> None:
    m = make().double()
    x = torch.randn(2, 4 + 3, 48, dtype=torch.float64)
    size = torch.tensor([[1.0] * 4 + [2.0, 1.0, 3.0]] * 2)
    mask = torch.tensor([[True] * 6 + [False]] * 2)
    t = Tokens(x, size, 4, unit=False)
    with torch.no_grad():
        wide = x[:, :4].reshape(2, -1)
        mean = (2 * x[:, 4] + x[:, 5] + 3 * x[:, 6]) / 6
        got = head(m, t, pre_logits=True)
        assert torch.allclose(got, torch.cat([wide, mean], 1), atol=1e-12)
        mean = (2 * x[:, 4] + x[:, 5]) / 3
        got = head(m, t._replace(mask=mask))
        assert torch.allclose(got, m.head(torch.cat([wide, mean], 1)), atol=1e-12)
        assert torch.equal(head(m, t._replace(unit=True)), m.forward_head(x))


@pytest.mark.parametrize("row", METHODS, ids=lambda r: r.id)
def test_the_slots_pass_every_reducer_untouched(row: Row) -> None:
    if refused(row, "jumbo"):
        with pytest.raises(zoo.errors.ZooError, match="has no one MLP"):
            model(row, "jumbo")
        return
    seen = []

    def note(block: int, before: Tokens, after: Tokens) -> None:
        seen.append((torch.equal(after.x[:, :3], before.x[:, :3]), after.prefix))

    with torch.no_grad():
        flow(model(row, "jumbo"), images(), note=note)
    assert seen and all(value == (True, 3) for value in seen)


def test_patch_dropping_and_a_reducer_train_together() -> None:
    m = zoo.wrap(make(patch_drop_rate=0.5), "tome", {"name": "constant_r", "r": 5}).train()
    logits = m(pictures())
    logits.square().mean().backward()
    assert m.unwrap().jumbo_token.grad.abs().max() > 0
    # The schedule then plans with what is there.
    assert m.eval()(pictures(), return_info=True)[1].tokens[0] == (68, 63)


def test_another_image_size_at_run_time() -> None:
    m = make(dynamic_img_size=True)
    reduced = zoo.wrap(m, "evit", {"name": "keep_rate", "rate": 0.6}).eval()
    with torch.no_grad():
        _, info = reduced(pictures(2, 48, 40), return_info=True)
    assert info.tokens[0][0] == 4 + 120 and info.grid == (12, 10)


def test_gradient_checkpointing_changes_nothing() -> None:
    results = []
    for enable in (False, True):
        m = zoo.wrap(make("lora"), "tome", {"name": "constant_r", "r": 8}).eval()
        m.set_grad_checkpointing(enable)
        logits = m(pictures())
        logits.square().mean().backward()
        results.append((logits, m.unwrap().jumbo_mlp.fc1.weight.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_traces_as_one_graph_and_exports() -> None:
    m = zoo.wrap(make(depth=2), "topk", {"name": "keep_rate", "rate": 0.6}).eval()
    x = pictures()
    torch._dynamo.reset()
    with torch.no_grad():
        expected = m(x)
        assert torch.allclose(torch.compile(m, fullgraph=True, backend="eager")(x), expected)
        batch = torch.export.Dim("batch", min=2, max=16)
        program = torch.export.export(m, (pictures(3),), dynamic_shapes={"images": {0: batch}})
        assert torch.allclose(program.module()(x), expected, atol=1e-4)
