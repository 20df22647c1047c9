"""Blocks in a straight line: the same bits as timm's modules, and only where nobody can tell."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from timm.layers import GELUTanh
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.flop_counter import FlopCounterMode

import zoo
from benchmarks.timing import peak_memory
from tests.cases import ALL, METHODS, Row, backbone, images, model
from zoo.model.straight import Straight, straight_blocks

#: Backbones of the tests all of whose blocks may run in a straight line.
STRAIGHT = {"plain", "distilled", "registers", "dinov2", "gap", "mae", "map", "avgmax", "clip"}


def straight(m: nn.Module) -> list[Straight | None]:
    """The blocks of a backbone, in evaluation and without gradients."""
    with torch.no_grad():
        return straight_blocks(m.blocks, torch.zeros(1, 5, m.embed_dim))


@pytest.fixture
def by_modules(monkeypatch: pytest.MonkeyPatch) -> Callable[[nn.Module, Tensor], Tensor]:
    """Run a model through its modules."""

    def run(m: nn.Module, x: Tensor) -> Tensor:
        with monkeypatch.context() as patch, torch.no_grad():
            patch.setattr("zoo.model.stage.straight_blocks", lambda blocks, x: [None] * len(blocks))
            return m(x)

    return run


@pytest.mark.parametrize("name", ALL)
def test_which_backbones_are_straight(name: str) -> None:
    assert all(straight(backbone(name))) == (name in STRAIGHT)


def test_normalised_queries_and_keys(by_modules: Callable[..., Tensor]) -> None:
    m = zoo.wrap(backbone("qk_norm", scale_attn_norm=False), "tome").eval()
    assert all(straight(m.backbone))
    with torch.no_grad():
        assert torch.equal(m(images()), by_modules(m, images()))


@pytest.mark.parametrize("row", METHODS, ids=lambda r: r.id)
def test_the_same_bits_as_the_modules(row: Row, by_modules: Callable[..., Tensor]) -> None:
    m, x = model(row), images(3)
    with torch.no_grad():
        assert torch.equal(m(x), by_modules(m, x))
        assert torch.equal(m(x[:1]), by_modules(m, x[:1]))


@pytest.mark.parametrize("name", sorted(STRAIGHT))
def test_the_same_bits_on_every_backbone(name: str, by_modules: Callable[..., Tensor]) -> None:
    m, x = zoo.wrap(backbone(name), "tome", {"name": "constant_r", "r": 8}).eval(), images(3)
    with torch.no_grad():
        assert torch.equal(m(x), by_modules(m, x))


@pytest.mark.parametrize("act", [nn.GELU(), nn.GELU("tanh"), GELUTanh(), nn.SiLU(), nn.ReLU()])
def test_a_block_equals_itself(act: nn.Module) -> None:
    m = backbone("dinov2").eval()
    block = m.blocks[0]
    block.mlp.act = act
    with torch.no_grad():
        nn.init.normal_(block.ls1.gamma)
        nn.init.normal_(block.ls2.gamma)
        x = torch.randn(2, 5, m.embed_dim)
        before = x.clone()
        parts = straight(m)[0]
        assert parts is not None
        y, seen = parts.attention(x, None, frozenset({"k", "x_norm"}), 1, own=False)
        assert torch.equal(parts.mlp(y), block(x)) and torch.equal(x, before)
        assert torch.equal(seen.x_norm, block.norm1(x)) and seen.v is None


def _hook(m: nn.Module) -> None:
    m.blocks[1].mlp.act.register_forward_hook(lambda *_: None)


def _pre_hook(m: nn.Module) -> None:
    m.blocks[1].norm1.register_forward_pre_hook(lambda *_: None)


def _replaced_function(m: nn.Module) -> None:
    layer = m.blocks[1].attn.proj
    layer.forward = lambda x: torch.zeros_like(x)


def _adapter(m: nn.Module) -> None:
    class WithAdapter(nn.Linear):
        pass

    m.blocks[1].attn.qkv.__class__ = WithAdapter


def _parametrised(m: nn.Module) -> None:
    parametrizations.weight_norm(m.blocks[1].mlp.fc1)
    assert parametrize.is_parametrized(m.blocks[1].mlp.fc1)


def _compiled(m: nn.Module) -> None:
    m.blocks[1].mlp.compile()


def _flattened(m: nn.Module) -> None:
    layer = m.blocks[1].mlp.fc2
    weight = layer.weight.data
    del layer._parameters["weight"]
    layer.weight = weight


def _mixed_types(m: nn.Module) -> None:
    m.blocks[1].norm2.double()


def _unfused(m: nn.Module) -> None:
    m.blocks[1].attn.fused_attn = False


def _dropout(m: nn.Module) -> None:
    m.blocks[1].mlp.drop1.train()


@pytest.mark.parametrize(
    "change",
    [
        *(_hook, _pre_hook, _replaced_function, _adapter, _parametrised, _compiled, _flattened),
        *(_mixed_types, _unfused, _dropout),
    ],
)
def test_a_changed_block_is_called(change: Callable[[nn.Module], None]) -> None:
    m = backbone("plain").eval()
    assert None not in straight(m)
    change(m)
    assert [i for i, b in enumerate(straight(m)) if b is None] == [1]


def test_a_block_of_another_class_is_left_alone() -> None:
    with torch.no_grad():
        assert straight_blocks([nn.Identity()], torch.zeros(1, 5, 8)) == [None]


def test_whoever_watches_gets_modules() -> None:
    m = backbone("plain").eval()
    x = torch.zeros(1, 5, m.embed_dim)
    none = [None] * len(m.blocks)
    assert straight_blocks(m.blocks, x) == none  # gradients
    with torch.no_grad():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert straight_blocks(m.blocks, x) == none
        with FlopCounterMode(display=False):
            assert straight_blocks(m.blocks, x) == none
        handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
        assert straight_blocks(m.blocks, x) == none
        handle.remove()
        assert straight_blocks(m.blocks, x.to("meta")) == none
        assert None not in straight_blocks(m.blocks, x)
    with torch.inference_mode():
        assert None not in straight_blocks(m.blocks, x)


@pytest.mark.parametrize("watched", ["mlp.fc1", "mlp.act", "mlp", "attn.proj", "attn", ""])
def test_hooks_see_outputs_that_stay(watched: str) -> None:
    m, seen = model(METHODS[0]), []
    with torch.no_grad():
        expected = m(images())
        part = m.backbone.blocks[1].get_submodule(watched)
        part.register_forward_hook(lambda a, b, out: seen.append((out, out.clone())))
        assert torch.equal(m(images()), expected)
    assert len(seen) == 1
    assert all(torch.equal(*pair) for pair in seen)


def test_a_hidden_layer_is_held_once() -> None:
    m = backbone("plain").eval()
    block, parts = m.blocks[0], straight(m)[0]
    assert parts is not None
    x = torch.randn(8, 64, m.embed_dim)
    output = 4 * x.numel() / 2**20
    hidden = output * block.mlp.fc1.out_features / m.embed_dim
    with torch.inference_mode():
        ours = peak_memory(lambda: parts.mlp(x), torch.device("cpu"))
        theirs = peak_memory(lambda: x + block.mlp(block.norm2(x)), torch.device("cpu"))
    assert ours == pytest.approx(hidden + output, rel=0.01)
    assert theirs > ours + 0.9 * (hidden - output)


@pytest.mark.parametrize("name", ["algm", "g2tm", "pixelprune", "rlt", "ats"])
def test_padding_is_left_out_in_double_precision(name: str) -> None:
    row = next(r for r in METHODS if r.name == name)
    m, x = model(row).double(), images(2).double()
    recorded = m(x).detach()  # with gradients, through the modules
    with torch.no_grad():
        assert torch.allclose(m(x), recorded, atol=1e-9)
        assert torch.allclose(m(x[:1]), recorded[:1], atol=1e-9)
