"""Whoever watches a model sees what happens in it: hooks on blocks and on what is inside them."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import zoo
from tests.cases import METHODS, Row, backbone, images, model
from zoo.errors import ZooError

#: One row per method.
FIRST = list({row.name: row for row in reversed(METHODS)}.values())[::-1]
KEEP = {"name": "keep_rate", "rate": 0.7}


def collected(m: Any, name: str) -> list[tuple[Tensor, Tensor]]:
    """What goes in and comes out of a part of every block, as a hook sees it."""
    seen: list[tuple[Tensor, Tensor]] = []
    for block in m.backbone.blocks:
        part = block.get_submodule(name)
        part.register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    return seen


@pytest.mark.parametrize("row", FIRST, ids=lambda r: r.id)
def test_hooks_on_blocks_and_attentions_fire(row: Row) -> None:
    m = model(row)
    with torch.no_grad():
        expected, info = m(images(), return_info="trace")
        blocks, attentions = collected(m, ""), collected(m, "attn")
        inside = collected(m, "mlp")
        assert torch.allclose(m(images()), expected, atol=1e-5)
    assert [len(seen) for seen in (blocks, attentions, inside)] == [4, 4, 4]
    for (before, after), (entering, _) in zip(blocks, info.tokens, strict=True):
        assert after.shape[1] <= before.shape[1] <= entering
    if m.reducer.site == "mid" and not row.restores:
        for (_, after), t in zip(blocks, info.trace, strict=True):
            assert torch.allclose(after, t.x, atol=1e-5)


@pytest.mark.parametrize("name", ["plain", "gap", "eva02", "dinov3", "post_norm", "jumbo"])
@pytest.mark.parametrize("reducer", [None, "tome", "ats", "mctf", "patchmerger"])
def test_every_family_is_heard(name: str, reducer: str | None) -> None:
    if reducer == "ats" and name == "gap":
        pytest.skip("needs a class token")
    m = zoo.wrap(backbone(name), reducer, KEEP if reducer else None).eval()
    blocks, attentions, maps = collected(m, ""), collected(m, "attn"), []
    for block in m.backbone.blocks:
        block.attn.fused_attn = False  # timm then sends the weights through this module
        block.attn.attn_drop.register_forward_hook(lambda _, args, out: maps.append(out))
    with torch.no_grad():
        m(images())
    assert len(blocks) == len(attentions) == len(maps) == 4
    assert all(torch.allclose(w.sum(-1), torch.ones(()), atol=1e-5) for w in maps)


def test_every_module_of_a_block_is_called_as_timm_calls_it() -> None:
    m = zoo.wrap(backbone("plain"), "tome", {"name": "constant_r", "r": 0}).eval()
    named = {part: name for name, part in m.backbone.blocks.named_modules() if name}
    seen: dict[str, Tensor] = {}
    for part in named:
        part.register_forward_hook(lambda part, args, out: seen.update({named[part]: out}))
    with torch.no_grad():
        m.backbone(images())
        theirs = dict(seen)
        seen.clear()
        m(images())
    assert seen.keys() == theirs.keys() and len(seen) > 50
    assert all(torch.allclose(seen[name], theirs[name], atol=1e-5) for name in theirs)


def test_hooks_may_change_what_passes() -> None:
    m = model(METHODS[0])
    block = m.backbone.blocks[2]
    with torch.no_grad():
        plain = m(images())
        handle = block.register_forward_pre_hook(lambda _, args: (args[0] * 2,))
        doubled = m(images())
        handle.remove()
        handle = block.register_forward_hook(lambda _, a, k, out: out.flip(-1), with_kwargs=True)
        turned = m(images())
        handle.remove()
        handle = block.attn.register_forward_hook(lambda _, args, out: torch.zeros_like(out))
        muted = m(images())
        handle.remove()
        assert torch.equal(m(images()), plain)
        assert not any(torch.allclose(x, plain, atol=1e-3) for x in (doubled, turned, muted))
        block.register_forward_hook(lambda _, args, out: out[:, :-1])
        with pytest.raises(ZooError, match=r"block 2 must answer with the shape \(2, 41, 48\)"):
            m(images())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_backward_hooks_get_gradients(checkpointing: bool) -> None:
    m = model(METHODS[0]).train()
    m.set_grad_checkpointing(checkpointing)
    block = m.backbone.blocks[1]
    got: dict[str, tuple[Tensor, Tensor]] = {}
    for name, part in (("block", block), ("attn", block.attn), ("mlp", block.mlp)):
        part.register_full_backward_hook(
            lambda _, given, out, name=name: got.update({name: (given[0], out[0])})
        )
    m(images()).sum().backward()
    assert got["block"][1].shape == (2, 49, 48)
    assert got["block"][0].shape == got["attn"][0].shape == (2, 57, 48)
    assert all(x.abs().sum() > 0 for pair in got.values() for x in pair)


def test_pruning_by_hooks_reaches_the_layers() -> None:
    """torch.nn.utils.prune computes a weight in a hook, right before its layer runs."""
    for name in ("tome", "mctf"):
        m = zoo.wrap(backbone("plain"), name, KEEP).eval()
        with torch.no_grad():
            before = m(images())
            for block in m.backbone.blocks:
                prune.l1_unstructured(block.attn.qkv, "weight", amount=0.8)
                block.attn.qkv.weight_orig.mul_(3)
            after = m(images())
            for block in m.backbone.blocks:
                prune.remove(block.attn.qkv, "weight")
            assert torch.allclose(after, m(images()), atol=1e-5)
        assert not torch.allclose(before, after, atol=1e-2)


def test_hooks_on_every_module_there_is() -> None:
    m, seen = model(METHODS[0]), []
    handle = nn.modules.module.register_module_forward_hook(lambda part, *_: seen.append(part))
    try:
        with torch.no_grad():
            m(images())
    finally:
        handle.remove()
    for block in m.backbone.blocks:
        assert seen.count(block) == seen.count(block.attn) == seen.count(block.mlp) == 1


def test_who_waits_in_vain_is_told_once() -> None:
    m = model(METHODS[0])
    m.backbone.register_forward_hook(lambda *_: None)
    with torch.no_grad(), pytest.warns(UserWarning, match=r"on backbone .*zoo.attention_maps"):
        m(images())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        m(images())
    other = model(METHODS[0])
    other.backbone.blocks[1].attn.forward = other.backbone.blocks[1].attn.forward
    with torch.no_grad(), pytest.warns(UserWarning, match="put into block 1"):
        other(images())
    quiet = model(METHODS[0])
    collected(quiet, "attn")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quiet(images())
