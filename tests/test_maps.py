"""`zoo.attention_maps`: the attention of every block over the tokens that are there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import zoo
from tests.cases import BACKBONES, METHODS, Row, backbone, images, model
from zoo.errors import ZooError

FIRST = list({row.name: row for row in reversed(METHODS)}.values())[::-1]


def of_timm(m: Any, x: Tensor) -> list[Tensor]:
    """The weights that timm's own attention computes when it is not fused."""
    found: list[Tensor] = []
    for block in m.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda _, args, out: found.append(out))
    with torch.no_grad():
        m(x)
    return found


@pytest.mark.parametrize("name", BACKBONES)
def test_the_dense_maps_are_those_of_timm(name: str) -> None:
    maps = zoo.attention_maps(backbone(name), images())
    theirs = of_timm(backbone(name), images())
    assert len(maps) == len(theirs) == 4
    for ours, want in zip(maps, theirs, strict=True):
        assert torch.allclose(ours.weights, want, atol=1e-5)
        prefix = ours.prefix
        assert torch.equal(ours.source, torch.arange(64).expand(2, -1)) and ours.grid == (8, 8)
        assert torch.equal(ours.on_patches().flatten(2), ours.weights[:, :, 0, prefix:])


@pytest.mark.parametrize("row", FIRST, ids=lambda r: r.id)
def test_every_method_shows_its_attention(row: Row) -> None:
    m = model(row)
    with torch.no_grad():
        expected, info = m(images(), return_info=True)
        maps = zoo.attention_maps(m, images())
        assert torch.equal(m(images(), return_info=True)[0], expected)  # nothing was left behind
    assert len(maps) == 4
    for (entering, leaving), a in zip(info.tokens, maps, strict=True):
        batch, heads, queries, keys = a.weights.shape
        assert (batch, heads) == (2, 3) and min(queries, leaving) <= entering
        total = a.weights.sum(-1)
        assert torch.allclose(total, torch.ones_like(total), atol=1e-4)
        assert a.source.shape == (2, 64) and a.source.max() < keys - a.prefix
        shown = a.on_patches()
        assert shown.shape == (2, 3, 8, 8) and shown.min() >= 0
        assert (shown.sum((2, 3)) <= a.weights[:, :, 0, a.prefix :].sum(-1) + 1e-5).all()


def test_patches_of_a_merged_token_share_its_weight() -> None:
    m = zoo.wrap(backbone("plain"), "tome", {"name": "constant_r", "r": 12}).eval()
    with torch.no_grad():
        last = zoo.attention_maps(m, images())[-1]
        trace = m(images(), return_info="trace")[1].trace
    assert last.weights.shape == (2, 3, 29, 29)
    assert torch.equal(last.source, trace[2].source)
    row, shown = last.weights[:, :, 0, 1:], last.on_patches().flatten(2)
    assert torch.allclose(shown.sum(2), row.sum(2), atol=1e-5)
    sizes = trace[2].patch_size
    token = last.source[0, 17]
    assert torch.allclose(shown[0, :, 17], row[0, :, token] / sizes[0, token], atol=1e-6)


def test_dropped_patches_get_nothing() -> None:
    m = zoo.wrap(backbone("plain"), "topk", {"name": "keep_rate", "rate": 0.5}).eval()
    with torch.no_grad():
        last = zoo.attention_maps(m, images())[-1]
    gone = (last.source < 0).unflatten(1, (8, 8)).unsqueeze(1)
    shown = last.on_patches()
    assert gone.any() and shown.masked_select(gone).eq(0).all()
    assert shown.masked_select(~gone).gt(0).all()


def test_gradients_flow_into_the_maps() -> None:
    m = zoo.wrap(backbone("plain"), "evit").eval()
    zoo.attention_maps(m, images())[-1].weights[:, :, 0].square().sum().backward()
    assert m.backbone.blocks[0].attn.qkv.weight.grad.abs().sum() > 0


def test_refusals_and_the_empty_batch() -> None:
    assert zoo.attention_maps(backbone("plain"), images()[:0])[0].weights.shape == (0, 3, 65, 65)
    with pytest.raises(ZooError, match="expected images of shape"):
        zoo.attention_maps(backbone("plain"), images()[0])
    with pytest.raises(ZooError, match=r"zoo\.attention_maps cannot be used here"):
        zoo.attention_maps(
            zoo.create_model("lookupvit_tiny_patch16_224"), torch.randn(1, 3, 224, 224)
        )
