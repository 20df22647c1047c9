"""Architectures that take no reducer and are there to be compared with."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import timm
import torch

import zoo
from zoo.checkpoint import save_pretrained
from zoo.cost.counters import torch_gmacs
from zoo.errors import UnsupportedModel, ZooError

_TINY = {"img_size": 64, "embed_dim": 16}


def test_a_gcvit_is_itself_and_is_counted_in_full() -> None:
    torch.manual_seed(0)
    model = zoo.create_model("gcvit_xxtiny", num_classes=10, **_TINY).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model(images), model.backbone(images))
    found = zoo.profile(model)
    assert found.macs == round(torch_gmacs(model.backbone, images[:1]) * 1e9)
    assert found.dense == found.gmacs
    assert [n for n, _ in found.tokens] == [256] * 2 + [64] * 2 + [16] * 6 + [4] * 2


@pytest.mark.slow
def test_a_gcvit_is_traced_as_one_graph() -> None:
    model = zoo.create_model("gcvit_xxtiny", num_classes=10, **_TINY).eval()
    graph = torch.compile(model, backend="eager", fullgraph=True)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(graph(images), model(images))


def test_published_sizes_of_gcvit() -> None:
    with torch.device("meta"):
        model = zoo.create_model("gcvit_tiny")
    # The paper's 4.7 G, which leaves out the convolutions on single pixels.
    assert zoo.profile(model).gmacs == pytest.approx(4.761, abs=1e-3)


@pytest.mark.parametrize("attach", [False, True])
def test_a_gcvit_refuses_a_reducer_with_its_reason(attach: bool) -> None:
    model = timm.create_model("gcvit_xxtiny", **_TINY)
    with pytest.raises(UnsupportedModel, match="takes no reducer: its blocks attend within windo"):
        if attach:
            zoo.attach(model, "tome", {"name": "constant_r", "r": 2})
        else:
            zoo.wrap(model, "tome", {"name": "constant_r", "r": 2})


def test_a_gcvit_is_saved_and_copied(tmp_path: Path) -> None:
    model = zoo.create_model("gcvit_xxtiny", num_classes=10, **_TINY).eval()
    images = torch.randn(1, 3, 64, 64)
    save_pretrained(model, tmp_path / "m")
    with torch.no_grad():
        want = model(images)
        assert torch.equal(zoo.load(tmp_path / "m")(images), want)
        assert torch.equal(copy.deepcopy(model)(images), want)
    with pytest.raises(ZooError, match="img_size"):
        model(torch.randn(1, 3, 32, 32))


DIGITS = "dualtoken_digits_unofficial"


def test_dualtoken_is_counted_in_full() -> None:
    model = zoo.create_model(DIGITS).eval()
    found = zoo.profile(model)
    assert found.macs == round(torch_gmacs(model.backbone, torch.empty(1, 1, 16, 16)) * 1e9)
    assert found.tokens == [(80, 80)] * 2 + [(32, 32)] * 3
    with torch.device("meta"):
        full = zoo.create_model("dualtoken_tiny_unofficial")
    # 49 global tokens beside maps of 28x28, 14x14 and 7x7.
    tokens = [n for n, _ in zoo.profile(full).tokens]
    assert tokens == [784 + 49] * 2 + [196 + 49] * 6 + [49 + 49] * 6


def test_global_tokens_of_dualtoken_reach_the_answer_and_learn() -> None:
    torch.manual_seed(0)
    model = zoo.create_model(DIGITS)
    model.backbone.set_grad_checkpointing(True)
    logits = model(torch.randn(2, 1, 16, 16))
    torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1])).backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.parameters())


def test_dualtoken_is_unofficial_wherever_it_is_named() -> None:
    assert {n for n in zoo.list_models("dualtoken*")} == {DIGITS, "dualtoken_tiny_unofficial"}
    page = Path(__file__).resolve().parents[1] / "docs" / "models" / "dualtoken.md"
    assert "unofficial" in page.read_text(encoding="utf-8").lower()
    with pytest.raises(UnsupportedModel, match="unofficial.*takes no reducer"):
        zoo.create_model(DIGITS, reducer="tome")


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ({"img_size": (16, 18)}, "multiple of 4, got 16x18"),
        ({"img_size": 14}, "multiple of 4, got 14x14"),
        ({"global_pool": "token"}, "global_pool='avg'"),
        ({"dims": (8,)}, "one entry per stage"),
    ],
)
def test_dualtoken_refuses_what_it_cannot_be(args: dict[str, object], says: str) -> None:
    with pytest.raises(ZooError, match=says):
        zoo.create_model(DIGITS, **args)


def test_dualtoken_is_saved_and_copied(tmp_path: Path) -> None:
    model = zoo.create_model(DIGITS, num_classes=3).eval()
    images = torch.randn(2, 1, 16, 16)
    save_pretrained(model, tmp_path / "m")
    with torch.no_grad():
        want = model(images)
        assert torch.equal(zoo.load(tmp_path / "m")(images), want)
        assert torch.equal(copy.deepcopy(model)(images), want)
        assert torch.equal(torch.export.export(model, (images,)).module()(images), want)
