"""Run-time options: exact where they say so, refused where invalid, out of the way elsewhere."""

from __future__ import annotations

import copy
import gc
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import zoo
from reduction.functional import kernels
from reduction.functional.attention import attention
from reduction.functional.masking import policy_softmax
from tests.cases import ALL, METHODS, Row, backbone, images, model
from zoo.adapters import fast_linear
from zoo.adapters.fast_linear import FastLinear
from zoo.cost.counters import fvcore_gmacs, torch_gmacs
from zoo.errors import ZooError
from zoo.model import plan as planning
from zoo.model.runtime import why_all_tokens

rows = pytest.mark.parametrize("row", METHODS, ids=lambda r: r.id)
HEADS = {name: not why_all_tokens(zoo.wrap(backbone(name), None).anatomy) for name in ALL}


def width(name: str = "plain") -> nn.Module:
    return backbone(name).eval()


# ------------------------------------------------------------------ last_block


def test_which_heads_read_the_class_token_alone() -> None:
    assert {"plain", "distilled", "registers", "dinov2", "clip", "qk_norm"} <= {
        n for n, alone in HEADS.items() if alone
    }
    assert {"gap", "mae", "map", "avgmax"} <= {n for n, alone in HEADS.items() if not alone}


@pytest.mark.parametrize("name", ALL)
def test_the_class_token_alone_gives_the_same_logits(name: str) -> None:
    m, x = zoo.wrap(width(name), None).eval(), images()
    if not HEADS[name]:
        with pytest.raises(ZooError, match="last_block=class_token is not possible here: the cl"):
            m.set_runtime(last_block="class_token")
        return
    with torch.no_grad():
        expected = m(x)
        m.set_runtime(last_block="class_token")
        assert (m(x) - expected).abs().max() < 1e-5
    assert m.token_counts()[-1] == (64 + m.prefix, m.prefix)


@rows
def test_the_class_token_alone_with_every_method(row: Row) -> None:
    m, x = model(row), images(3)
    if why_all_tokens(m.anatomy):
        with pytest.raises(ZooError, match=f"reducer '{row.name}' needs all tokens"):
            m.set_runtime(last_block="class_token")
        return
    with torch.no_grad():
        expected, info = m(x, return_info=True)
        full = zoo.profile(m).gmacs
        m.set_runtime(last_block="class_token")
        assert (m(x) - expected).abs().max() < 1e-5
        # Asked for all tokens, the block runs in full.
        again, whole = m(x, return_info=True)
        assert torch.equal(again, expected) and whole.tokens == info.tokens
        assert m.forward_features(x).shape[1] == info.tokens[-1][1]
    assert zoo.profile(m).gmacs < full


@pytest.mark.parametrize("name", [name for name, alone in HEADS.items() if alone])
def test_the_shorter_block_is_counted(name: str) -> None:
    m = zoo.wrap(width(name), "tome", {"name": "constant_r", "r": 8}, last_block="class_token")
    counted = zoo.profile(m.eval()).gmacs
    assert torch_gmacs(m, images(1)) == pytest.approx(counted, rel=1e-5)
    # fvcore listens to every layer, and what somebody listens to is computed as a whole.
    full = zoo.profile(m.set_runtime(last_block="full")).gmacs
    m.set_runtime(last_block="class_token")
    assert counted * (1 - 1e-5) <= fvcore_gmacs(m, images(1)) < full


def test_the_class_token_alone_trains_in_full() -> None:
    m = zoo.wrap(width(), None, last_block="class_token").train()
    dense = zoo.wrap(copy.deepcopy(m.backbone), None).train()
    for net in (m, dense):
        net(images()).square().mean().backward()
    for a, b in zip(m.parameters(), dense.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_plugins_want_the_last_block() -> None:
    with pytest.raises(ZooError, match="a plugin .*cla.* looks at tokens"):
        zoo.wrap(width(), "topk", plugins=["cla"], last_block="class_token")


def test_the_class_token_alone_exports() -> None:
    m, x = zoo.wrap(width(), "tome", last_block="class_token").eval(), images(4)
    with torch.no_grad():
        program = torch.export.export(
            m, (x,), dynamic_shapes={"images": {0: torch.export.Dim("batch", min=2, max=64)}}
        )
        assert torch.allclose(program.module()(images(7)), m(images(7)), atol=1e-5)


# ------------------------------------------------------------------ fast_linear


@pytest.fixture
def fast() -> Any:
    if not fast_linear.available():
        pytest.skip("this build of torch has no oneDNN")
    fast_linear.forget()
    yield
    fast_linear.forget()


@pytest.mark.parametrize("mode", ["onednn", "packed", "auto"])
@pytest.mark.parametrize("name", ["plain", "eva02", "eva02_fused", "qk_norm"])
def test_fast_layers_agree(fast: None, name: str, mode: str) -> None:
    m = backbone(name)
    plain = zoo.wrap(copy.deepcopy(m), "tome").eval()
    quick = zoo.wrap(m, "tome", linear=mode).eval()
    with torch.inference_mode():
        assert (quick(images()) - plain(images())).abs().max() < 1e-4
    for net in (plain, quick):
        net(images()).square().mean().backward()
    for a, b in zip(quick.parameters(), plain.parameters(), strict=True):
        assert (a.grad - b.grad).abs().max() < 1e-4


def test_only_the_wrapper_runs_them(fast: None, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = fast_linear._by_operator
    monkeypatch.setattr(fast_linear, "_by_operator", lambda *a: calls.append(1) or real(*a))
    m = backbone("plain")
    quick, plain = zoo.wrap(m, None, linear="onednn").eval(), zoo.wrap(m, None).eval()
    with torch.no_grad():
        plain(images())
        m(images())
        assert not calls
        quick(images())
        assert len(calls) == 17  # four in each of four blocks, and the classifier


def test_a_changed_weight_counts_at_once(fast: None) -> None:
    m = zoo.wrap(backbone("plain"), None, linear="onednn").eval()
    with torch.inference_mode():
        before = m(images())
        m.backbone.blocks[0].mlp.fc1.weight.data.mul_(3.0)
        after = m(images())
        m.set_runtime(linear="plain")
        assert (m(images()) - after).abs().max() < 1e-4 < (before - after).abs().max()


def test_names_and_files_stay(fast: None) -> None:
    m = backbone("plain")
    names = list(m.state_dict())
    quick = zoo.wrap(m, "tome", linear="onednn").eval()
    assert list(m.state_dict()) == names
    assert "runtime" not in quick.recipe and "fast" not in str(quick.recipe)
    assert all(
        isinstance(layer, nn.Linear) for layer in m.modules() if "Linear" in str(type(layer))
    )
    with torch.no_grad():
        expected = quick(images())
        for twin in (copy.deepcopy(quick), pickle.loads(pickle.dumps(quick))):
            assert twin.runtime.linear == "onednn" and torch.equal(twin(images()), expected)


def test_others_see_plain_layers(fast: None) -> None:
    """Tracers, compilers, exporters, counters, transforms, autocast and other types."""
    m = backbone("plain")
    plain, quick = (zoo.wrap(m, "topk", linear=mode).eval() for mode in ("plain", "onednn"))
    x = images()
    with torch.no_grad():
        expected = plain(x)
        program = torch.export.export(quick, (x,))
        targets = {str(n.target) for n in program.graph.nodes}
        assert not any("mkldnn" in t or "conv" in t.replace("conv2d", "", 1) for t in targets)
        assert torch.equal(program.module()(x), expected)
        torch._dynamo.reset()
        compiled = torch.compile(quick, fullgraph=True, backend="eager")
        assert torch.allclose(compiled(x), expected, atol=1e-6)
        with FlopCounterMode(display=False) as ours:
            quick(x)
        with FlopCounterMode(display=False) as theirs:
            plain(x)
        assert ours.get_total_flops() == theirs.get_total_flops()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(quick(x), plain(x))
        layer = FastLinear(4, 5)
        with fast_linear.using("onednn"):
            batched = torch.func.vmap(layer)(torch.ones(3, 2, 4))
            assert torch.allclose(batched, nn.Linear.forward(layer, torch.ones(3, 2, 4)))
        half, other = quick.bfloat16()(x.bfloat16()), plain.bfloat16()(x.bfloat16())
        assert (half - other).abs().max() < 0.05


def test_fast_layers_under_gradient_checkpointing(fast: None) -> None:
    grads = []
    for enable in (False, True):
        m = zoo.wrap(backbone("plain"), "tome", linear="onednn")
        m.set_grad_checkpointing(enable)
        m(images()).square().mean().backward()
        grads.append([p.grad for p in m.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["plain", "eva02", "qk_norm"])
def test_packed_layers_agree_and_are_packed_once(fast: None, name: str, dtype: torch.dtype) -> None:
    m = backbone(name).to(dtype)
    plain = zoo.wrap(copy.deepcopy(m), "tome").eval()
    quick = zoo.wrap(m, "tome", linear="packed").eval()
    x = images().to(dtype)
    with torch.no_grad():
        assert (quick(x) - plain(x)).abs().max() < (1e-4 if dtype == torch.float32 else 0.05)
        copies = {w: p for w, (_, p) in fast_linear._PACKED.items()}
        layers = sum(isinstance(c, nn.Linear) for c in m.modules())
        assert 0 < len(copies) <= layers and fast_linear.packed_bytes() > 0
        quick(x)
        assert all(fast_linear._PACKED[w][1] is p for w, p in copies.items())


def test_packed_copies_follow_their_weights(fast: None) -> None:
    m = zoo.wrap(backbone("plain"), None, linear="packed").eval()
    weight = m.backbone.blocks[0].mlp.fc1.weight
    with torch.no_grad():
        before = m(images())
        weight.mul_(3.0)
        after = m(images())
        assert (after - m.set_runtime(linear="plain")(images())).abs().max() < 1e-4
        assert (after - before).abs().max() > 1e-4
        m.set_runtime(linear="packed")
        state = {k: v * 2 for k, v in m.state_dict().items()}
        m.load_state_dict(state)
        loaded = m(images())
        assert (loaded - m.set_runtime(linear="plain")(images())).abs().max() < 1e-3
        weight.data.mul_(3.0)  # leaves no trace
        fast_linear.forget_packed(m)
        m.set_runtime(linear="packed")
        written = m(images())
        assert (written - m.set_runtime(linear="plain")(images())).abs().max() < 1e-3
    assert "packed" not in str(m.state_dict().keys())
    del m, weight
    gc.collect()
    assert fast_linear.packed_bytes() == 0


def test_nothing_is_packed_in_training_or_for_others(fast: None) -> None:
    m = zoo.wrap(backbone("plain"), "tome", linear="packed")
    m(images()).square().mean().backward()
    torch.export.export(m.eval(), (images(),))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        m(images())
    assert fast_linear.packed_bytes() == 0
    copy.deepcopy(m), pickle.dumps(m)


def test_the_former_name_of_the_option(fast: None) -> None:
    for former, now in (("off", "plain"), ("on", "onednn"), ("auto", "auto"), (True, "onednn")):
        assert zoo.wrap(backbone("plain"), None, fast_linear=former).runtime.linear == now
        assert zoo.load("vit_digits", fast_linear=former).runtime.linear == now


def test_auto_takes_what_is_faster(fast: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(*given: Any) -> torch.Tensor:
        sum(i for i in range(100_000))
        return torch.nn.functional.linear(*given)

    for name, expected in (("_plain", "oneDNN"), ("_by_operator", "default")):
        fast_linear.forget()
        with monkeypatch.context() as patch:
            patch.setattr(fast_linear, name, slow)
            patch.setattr(fast_linear, "_by_convolution", slow)
            found = fast_linear._chosen(64, 64, True, False, True, 1)
            assert (found is slow) == (expected != "oneDNN" and name == "_plain")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"last_block": "cls"}, "last_block must be one of full, class_token"),
        ({"fast_linear": "yes"}, "fast_linear must be one of off, auto, on"),
        ({"linear": "on"}, "linear must be one of plain, auto, packed, onednn"),
        ({"fast": 1}, "unknown runtime option 'fast'"),
        ({"buckets": 5}, "buckets must be one of 1, 2, 3, 4, auto, got 5"),
        ({"buckets": True}, "buckets must be one of"),
        ({"buckets": [2]}, "buckets must be one of"),
        ({"own_kernels": 1}, "own_kernels must be true or false"),
    ],
)
def test_a_wrong_option_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ZooError, match=message):
        zoo.wrap(backbone("plain"), None).set_runtime(**options)


def test_options_of_load() -> None:
    m = zoo.load("vit_digits", fast_linear=True, last_block="class_token")
    assert m.runtime[:2] == ("class_token", "onednn")


# ------------------------------------------------------------------ attention kernels


@pytest.fixture
def explicit(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("ZOO_ATTN", "explicit")
    monkeypatch.setattr(kernels, "SMALL", 0)
    kernels.forget()
    yield
    kernels.forget()


@pytest.mark.parametrize("bias", [None, 1, 3])
@pytest.mark.parametrize("n", [1, 40, 80])
def test_kernels_agree(bias: int | None, n: int) -> None:
    g = torch.Generator().manual_seed(n)
    q, k, v = torch.randn(3, n, 3, 4, 16, generator=g).permute(2, 0, 3, 1, 4).unbind(0)
    added = None if bias is None else torch.randn(bias, 1, 1, n, generator=g)
    expected = kernels.fused(q, k, v, 0.25, added)
    for kernel in (kernels.by_image, kernels.at_once, kernels.plain):
        assert (kernel(q, k, v, 0.25, added) - expected).abs().max() < 1e-5


@rows
def test_explicit_kernels_change_nothing(row: Row, explicit: None) -> None:
    m, x = model(row), images(3)
    with torch.no_grad():
        with kernels.forced("sdpa"):
            expected = m(x)
        assert not kernels.choices() and kernels.mode() == "explicit"
        assert (m(x) - expected).abs().max() < 1e-4
    assert not expected.requires_grad


def test_a_choice_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "SMALL", 0)
    kernels.forget()
    calls = []
    real = kernels._fastest
    monkeypatch.setattr(kernels, "_fastest", lambda *a: calls.append(1) or real(*a))
    q = torch.randn(2, 3, 40, 16)
    with torch.no_grad():
        for n in (40, 40, 39, 33):
            attention(q[:, :, :n], q[:, :, :n], q[:, :, :n], scale=1.0)
    assert len(calls) == 1 and len(kernels.choices()) == 1
    kernels.forget()


def test_a_wrong_kernel_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels.forget()
    monkeypatch.setenv("ZOO_ATTN", "flash")
    with pytest.raises(ZooError, match="ZOO_ATTN must be one of auto, sdpa, explicit"):
        kernels.mode()


def test_checkpointing_with_explicit_kernels(explicit: None) -> None:
    m = model(METHODS[0])
    m.set_grad_checkpointing(True)
    m(images()).square().mean().backward()


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_masked_softmax_has_the_same_gradients(scale: float) -> None:
    """In float32 a function of its own computes them, in float64 autograd does."""
    g = torch.Generator().manual_seed(0)
    logits = scale * torch.randn(2, 3, 9, 9, generator=g)
    policy = torch.cat(
        [torch.rand(1, 9, generator=g), torch.tensor([[1.0, 0, 0, 1, 1, 0, 1, 0, 1]])]
    )
    seed = torch.randn(2, 3, 9, 9, generator=g)
    found = []
    for dtype in (torch.float32, torch.float64):
        z, p = logits.to(dtype).requires_grad_(), policy.to(dtype).requires_grad_()
        out = policy_softmax(z, p)
        found.append((out, *torch.autograd.grad(out, (z, p), seed.to(dtype))))
    for ours, exact in zip(*found, strict=True):
        gap = (ours - exact).detach().abs().max()
        assert gap < 1e-5 * exact.detach().abs().max().clamp_min(1)


# ------------------------------------------------------------------ the hot path


def test_the_plan_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    m, calls = model(METHODS[0]), []
    real = planning.make_plan

    def counted(*given: Any, **named: Any) -> Any:
        calls.append(1)
        return real(*given, **named)

    monkeypatch.setattr(planning, "make_plan", counted)
    with torch.no_grad():
        m(images())
        m(images(3))
        assert len(calls) == 1
        before = m.token_counts()
        m.schedule = zoo.wrap(backbone("plain"), "tome", {"name": "constant_r", "r": 3}).schedule
        assert m(images(), return_info=True)[1].tokens == tuple(m.token_counts())
        assert m.token_counts() != before


def test_a_changed_reducer_is_planned_again() -> None:
    m = zoo.wrap(backbone("plain"), "evit").eval()
    with torch.no_grad():
        fused = m(images(), return_info=True)[1].tokens
        m.reducer.fuse = False
        assert m(images(), return_info=True)[1].tokens != fused
        m.schedule.rate = 0.5
        assert m(images(), return_info=True)[1].tokens == tuple(m.token_counts())


# ------------------------------------------------------------------ without a clock


@pytest.fixture
def no_clock(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Whoever measures fails."""

    def clock() -> float:
        raise AssertionError("a clock was asked")

    monkeypatch.setattr(kernels, "SMALL", 0)
    monkeypatch.setattr(kernels.time, "perf_counter", clock)
    kernels.forget()
    fast_linear.forget()
    yield
    kernels.set_deterministic(False)
    torch.use_deterministic_algorithms(False)
    kernels.forget()
    fast_linear.forget()


@pytest.mark.parametrize("asked", ["auto", "explicit"])
@pytest.mark.parametrize("switch", [kernels.set_deterministic, torch.use_deterministic_algorithms])
def test_no_clock_is_asked_where_runs_must_repeat(
    no_clock: None, switch: Any, asked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZOO_ATTN", asked)
    m = zoo.wrap(backbone("plain"), "tome").set_runtime(fast_linear="auto", own_kernels=True)
    switch(True)
    with torch.no_grad():
        m.eval()(images())
    m.train()(images()).square().mean().backward()
    used = kernels.chosen_kernels()
    attention = {v for k, v in used.items() if k.startswith("attention")}
    assert attention == ({"fused"} if asked == "auto" else {"by_image", "plain"})
    if fast_linear.available():
        assert {v for k, v in used.items() if k.startswith("linear")} == {"default"}


def test_what_was_measured_before_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "SMALL", 0)
    monkeypatch.setattr(kernels, "_fastest", lambda rivals, *_: rivals[-1])
    kernels.forget()
    q = torch.rand(2, 1, 80, 8)
    try:
        with torch.no_grad():
            assert kernels.choose(q, q, q, 1.0, None) is kernels.by_image
            kernels.set_deterministic(True)
            assert kernels.choose(q, q, q, 1.0, None) is kernels.fused
        threads = torch.get_num_threads()
        words = f"attention 1x8, up to 96 tokens, batch, {threads} thread" + "s" * (threads > 1)
        assert kernels.chosen_kernels() == {words: "fused"}
        kernels.forget_used()
        assert kernels.chosen_kernels() == {}
    finally:
        kernels.set_deterministic(False)
        kernels.forget()
