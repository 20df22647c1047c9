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
