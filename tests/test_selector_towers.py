"""`zoo.selector`: a tower whose output is the tokens that a selector leaves."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import reduction
import zoo
from reduction import Selection, retained_mask, select
from tests.cases import WITHOUT_CLASS_TOKEN, backbone, images
from tests.covering import crossed
from tests.selector_cases import SELECTOR_CASES
from zoo.adapters.tower import find_tower
from zoo.errors import ZooError

NAMES = sorted(SELECTOR_CASES)
TOWERS = ["plain", "distilled", "registers", "gap", "map", "clip", "qk_norm", "eva02", "dinov3"]


def by_hand(model: Any, x: Tensor, name: str, keep: int) -> Selection:
    """The same from whole attention maps and features that others hand out."""
    depth, source = model.depth, max(model.depth - 2, 0)
    maps = zoo.attention_maps(model, x)
    features, heads = (
        model.forward_intermediates(
            x,
            indices=[source],
            output_fmt="NLC",
            intermediates_only=True,
            return_prefix_tokens=bool(model.prefix),
        )[0]
        if model.prefix
        else (
            model.forward_intermediates(
                x, indices=[source], output_fmt="NLC", intermediates_only=True
            )[0],
            None,
        )
    )
    given: dict[str, Tensor] = {}
    keys: dict[int, Tensor] = {}
    for i, block in enumerate(model.tower.blocks(model.backbone)):
        keys[i] = _keys(model, block, i, x)
    has_class = model.tower.class_tokens(model.backbone) > 0
    for signal, block in reduction.signals_of(name, depth, has_class):
        weights = maps[block].weights
        if signal.startswith("cls_row"):
            given[signal] = weights[:, :, 0]
        elif signal.startswith("column"):
            given[signal] = weights.mean((1, 2))
        elif signal == "k" and block == source:
            given[signal] = keys[block]
    if heads is not None and has_class:
        given["class_token"] = heads[:, 0]
    return select(features, keep, name, grid=model.grid, **given)


def _keys(model: Any, block: Any, i: int, x: Tensor) -> Tensor:
    """Keys of a block from what enters its attention, by a hook."""
    from zoo.adapters.attention import projection
    from zoo.adapters.blocks import block_adapter

    seen: list[Tensor] = []
    norm = block.norm1
    handle = norm.register_forward_hook(lambda m, args, out: seen.append(out))
    model(x)
    handle.remove()
    attn = block_adapter(block).attn(block)
    return projection(attn)(attn, seen[0])[1]


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("name", ["fastervlm", "visionzip", "hiprune", "vscan", "scope", "dpp"])
def test_signals_are_those_of_the_right_blocks(tower: str, name: str) -> None:
    m, x = backbone(tower), images(2)
    with torch.no_grad():
        wrapped = zoo.wrap(m, None)
        got = zoo.selector(m, name, keep=10).select(x)
        expected = by_hand(wrapped, x, name, 10)
    assert torch.equal(got.indices, expected.indices)
    assert torch.equal(got.order, expected.order)
    assert torch.allclose(got.features, expected.features, atol=1e-4)


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("name", NAMES)
def test_every_selector_on_every_tower(tower: str, name: str) -> None:
    m, x = backbone(tower), images(3)
    with torch.no_grad():
        module = zoo.selector(m, name, keep=9)
        got = module.select(x)
        assert got.features.shape == (3, 9, m.embed_dim) == module(x).shape
        one = module.select(x[1:2])
    assert module.retained_count() == 9 and retained_mask(got).sum(1).tolist() == [9] * 3
    assert torch.equal(one.indices, got.indices[1:2])
    signals = [s for s, _ in module.signals]
    assert ("cls_row" in signals) <= (tower not in WITHOUT_CLASS_TOKEN)


def test_prumerge_reads_queries_and_keys_of_the_block_behind() -> None:
    m, x = backbone("plain"), images(2)
    with torch.no_grad():
        got = zoo.selector(m, "prumerge", keep=9, neighbours=4).select(x)
        state = m.blocks[:-1](m.norm_pre(m._pos_embed(m.patch_embed(x))))
        attn = m.blocks[-1].attn
        qkv = attn.qkv(m.blocks[-1].norm1(state))
        q, k, _ = qkv.chunk(3, -1)
        expected = select(state[:, 1:], 9, "prumerge", q=q, k=k, neighbours=4)
    assert torch.equal(got.order, expected.order)
    assert torch.allclose(got.features, expected.features, atol=1e-4)


def test_blocks_whose_output_nobody_reads_are_not_run_and_no_map_is_made() -> None:
    m, x = backbone("plain"), images(2)
    called = []
    for i, block in enumerate(m.blocks):
        block.mlp.register_forward_hook(lambda *_, i=i: called.append(i))
    for name in ("fastervlm", "hiprune", "prumerge"):
        called.clear()
        zoo.selector(m, name, keep=9)(x)
        assert called == list(range(len(m.blocks) - 1))
        needs = {s.removesuffix("_shallow") for s, _ in zoo.selector(m, name, keep=9).signals}
        assert "attn" not in needs


def test_which_block_and_norm_can_be_chosen() -> None:
    m, x = backbone("plain"), images(2)
    with torch.no_grad():
        last = zoo.selector(m, "random", keep=64, block=-1, norm=True)(x)
        assert torch.allclose(last, m.forward_features(x)[:, 1:], atol=1e-5)
        early = zoo.selector(m, "random", keep=64, block=0)(x)
        (wanted,) = m.forward_intermediates(
            x, indices=[0], output_fmt="NLC", intermediates_only=True
        )
    assert torch.allclose(early, wanted, atol=1e-5)
    for block in (12, -13, True, "last"):
        with pytest.raises(ZooError, match="block must be"):
            zoo.selector(m, block=block)


@pytest.mark.parametrize("reducer", ["tome", "topk", "evit", "dpcknn", "pitome"])
@pytest.mark.parametrize(
    "name", ["fastervlm", "visionzip", "scope", "prumerge", "dpp", "vispruner"]
)
def test_a_reducer_inside_the_tower(reducer: str, name: str) -> None:
    m, x = backbone("plain"), images(3)
    depth = len(m.blocks)
    schedule = {"name": "per_block", "keep": [50, 40] + [None] * (depth - 2)}
    model = zoo.wrap(m, reducer, schedule).eval()
    module = zoo.selector(model, name, keep=12)
    with torch.no_grad():
        got = module.select(x)
        _, info = model(x, return_info="trace")
    assert got.features.shape[1] == 12 == module.retained_count()
    state = info.trace[depth - 2]
    for i in range(3):
        patches = got.indices[i]
        assert (patches[patches >= 0].diff() > 0).all()
        # A patch is where its token went.
        for j, token in enumerate(state.source[i].tolist()):
            row = int(got.slot[i, j])
            if token < 0:
                assert row == -1
            same = state.source[i] == token
            assert (got.slot[i][same] == row).all()
        for row, patch in enumerate(patches.tolist()):
            if patch >= 0:
                token = state.origin[i].tolist().index(patch)
                if name in ("fastervlm", "scope", "dpp", "vispruner"):
                    assert torch.allclose(got.features[i, row], state.x[i, 1 + token], atol=1e-5)
    # As many as there are: what the tower left, in the order of the patches.
    with torch.no_grad():
        whole = zoo.selector(model, name, keep=64).select(x)
    assert whole.features.shape[1] == state.x.shape[1] - 1


def test_attention_before_a_merge_is_added_up_and_keys_are_averaged() -> None:
    m, x = backbone("plain"), images(2)
    depth = len(m.blocks)
    r = [0] * depth
    r[depth - 2] = 20
    model = zoo.wrap(m, "tome", {"name": "constant_r", "r": r}).eval()
    module = zoo.selector(model, "visionzip", keep=12)
    with torch.no_grad():
        inputs, t = module.given(x)
        dense = zoo.selector(m, "visionzip", keep=12).given(x)[0]
        _, info = model(x, return_info="trace")
    source = info.trace[depth - 2].source
    for i in range(2):
        for token in range(t.n):
            members = (source[i] == token).nonzero().flatten() + 1
            row = dense.signals["cls_row"][i][:, members].sum(1)
            key = dense.signals["k"][i][:, members].mean(1)
            assert torch.allclose(inputs.signals["cls_row"][i][:, 1 + token], row, atol=1e-6)
            assert torch.allclose(inputs.signals["k"][i][:, 1 + token], key, atol=1e-5)


class Merger(nn.Module):
    """2x2 patches side by side, as language models with pixel shuffle take them."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.proj = nn.Linear(4 * width, out)

    def forward(self, x: Tensor) -> Tensor:
        side = int(x.shape[1] ** 0.5) // 2
        x = x.unflatten(1, (side, 2, side, 2)).transpose(2, 3).flatten(3).flatten(1, 2)
        return self.proj(x)


def test_towers_whose_patches_are_merged_in_groups() -> None:
    m, x = backbone("plain"), images(2)
    merger = Merger(m.embed_dim, 20)
    with torch.no_grad():
        for name in NAMES:
            module = zoo.selector(m, name, keep=5, merger=merger, group=4)
            got = module.select(x)
            assert got.features.shape == (2, 5, 20) and got.slot.shape == (2, 16)
            assert module.retained_count() == 5
        whole = zoo.selector(m, "random", keep=16, merger=merger, group=4)(x)
        kept = zoo.selector(m, "random", keep=5, merger=merger, group=4).select(x)
    assert torch.equal(
        kept.features, torch.stack([w[i] for w, i in zip(whole, kept.indices, strict=True)])
    )
    with pytest.raises(ZooError, match="both merger and group"):
        zoo.selector(m, group=4)


def test_a_projector_stands_where_the_method_reads() -> None:
    m, x = backbone("plain"), images(2)
    projector = nn.Sequential(nn.Linear(m.embed_dim, 24), nn.GELU(), nn.Linear(24, 20))
    with torch.no_grad():
        for name in ("fastervlm", "divprune", "vscan", "visionzip"):
            module = zoo.selector(m, name, keep=7, projector=projector)
            assert module(x).shape == (2, 7, 20)
        plain = zoo.selector(m, "scope", keep=7).select(x)
        behind = zoo.selector(m, "scope", keep=7, projector=projector).select(x)
        assert torch.equal(plain.indices, behind.indices)
        assert torch.allclose(projector(plain.features), behind.features)
        inputs, _ = zoo.selector(m, "divprune", keep=7, projector=projector).given(x)
        assert inputs.features.shape == (2, 64, 20)


def test_counts_before_are_rows_after_at_other_image_sizes() -> None:
    m = backbone("plain", dynamic_img_size=True)
    for keep in (7, 0.3):
        module = zoo.selector(m, "visionzip", keep=keep)
        for size in ((32, 32), (48, 32), (16, 20)):
            x = torch.randn(1, 3, *size)
            assert module(x).shape[1] == module.retained_count(*size)


def test_gradients_checkpointing_copies_and_empty_batches() -> None:
    m, x = backbone("plain"), images(2)
    module = zoo.selector(m, "visionzip", keep=7)
    module(x).square().mean().backward()
    grads = [p.grad.clone() for p in m.blocks[0].parameters()]
    assert all(bool(g.abs().sum() > 0) for g in grads)
    m.zero_grad()
    m.set_grad_checkpointing(True)
    module(x).square().mean().backward()
    for p, g in zip(m.blocks[0].parameters(), grads, strict=True):
        assert torch.allclose(p.grad, g, atol=1e-6)
    assert m.blocks[-1].mlp.fc1.weight.grad is None
    with torch.no_grad():
        expected = module(x)
        for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert torch.equal(other(x), expected)
        assert module(x[:0]).shape == (0, 7, m.embed_dim)
        with torch.autocast("cpu", torch.bfloat16):
            assert module(x).isfinite().all()
    assert "visionzip" in repr(module)


@pytest.mark.parametrize(
    ("name", "reducer"),
    crossed(
        ["fastervlm", "visionzip", "hiprune", "scope", "divprune"],
        [None, "tome"],
        lambda _: "inside",
    ),
)
def test_exports_and_compiles(name: str, reducer: str | None) -> None:
    if reducer is not None and name == "hiprune":
        pytest.skip("reads neighbours")
    m, x = backbone("plain"), images(2)
    schedule = None if reducer is None else {"name": "constant_r", "r": 4}
    module = zoo.selector(zoo.wrap(m, reducer, schedule).eval(), name, keep=6).eval()
    with torch.no_grad():
        expected = module(x)
        program = torch.export.export(module, (x,))
        assert torch.allclose(program.module()(x), expected, atol=1e-4)
        torch._dynamo.reset()
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        assert torch.allclose(compiled(x), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "fastvlm"}, "did you mean 'fastervlm'"),
        ({"keep": 0}, "keep must be"),
        ({"keep": None}, "needs keep"),
        ({"alpha": 1}, "it takes"),
    ],
)
def test_what_does_not_go_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ZooError, match=message):
        zoo.selector(backbone("plain"), **options)


def test_parts_that_do_not_go_together_are_refused() -> None:
    tome = zoo.wrap(backbone("plain"), "tome", {"name": "constant_r", "r": 4})
    with pytest.raises(ZooError, match="neighbours"):
        zoo.selector(tome, "hiprune")
    with pytest.raises(ZooError, match="no reducer inside"):
        zoo.selector(tome, "scope", merger=Merger(8, 8), group=4)
    with pytest.raises(ZooError, match="another number of tokens"):
        zoo.selector(zoo.wrap(backbone("plain"), "ats"), "scope")
    with pytest.raises(ZooError, match="does not have"):
        zoo.selector(backbone("gap"), "visionzip", class_token=True)
    with pytest.raises(ZooError, match="plugin that adds tokens"):
        zoo.selector(zoo.wrap(backbone("plain"), None, plugins=["clc"]), "scope")
    with pytest.raises(ZooError, match="follows from the image"):
        zoo.selector(backbone("plain"), "prumerge", None, adaptive=True).retained_count()


@pytest.mark.parametrize("name", ["CLIPVision", "SiglipVision", "Dinov2"])
def test_towers_of_hugging_face(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = getattr(transformers, f"{name}Config")(
        **shape, image_size=32, patch_size=4, attn_implementation="eager"
    )
    m = getattr(transformers, f"{name}Model")(config).eval()
    if find_tower(m) is None:
        pytest.skip("no tower of this library here")
    with torch.no_grad():
        for parameter in m.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15)
    x = images(2)
    with torch.no_grad():
        told = m(pixel_values=x, output_hidden_states=True, output_attentions=True)
        attention, prefix = told.attentions[-2], told.hidden_states[-2].shape[1] - 64
        row = attention[:, :, 0] if prefix else attention.mean(2)
        wanted = select(told.hidden_states[-2][:, prefix:], 9, "fastervlm", cls_row=row)
        got = zoo.selector(m, "fastervlm", keep=9).select(x)
        assert torch.equal(got.order, wanted.order)
        assert torch.allclose(got.features, wanted.features, atol=1e-4)
        for method in ("visionzip", "prumerge", "hiprune", "divprune"):
            assert zoo.selector(m, method, keep=9)(x).shape == (2, 9, 32)
        schedule = {"name": "constant_r", "r": 4}
        assert zoo.selector(zoo.wrap(m, "tome", schedule), "scope", keep=9)(x).shape == (2, 9, 32)


def test_towers_of_open_clip() -> None:
    transformer = pytest.importorskip("open_clip.transformer")
    torch.manual_seed(0)
    m = transformer.VisionTransformer(
        image_size=32, patch_size=4, width=32, layers=4, heads=4, mlp_ratio=2, output_dim=16
    ).eval()
    if find_tower(m) is None:
        pytest.skip("no tower of this library here")
    with torch.no_grad():
        for method in ("fastervlm", "visionzip", "prumerge", "hiprune"):
            assert zoo.selector(m, method, keep=9)(images(2)).shape == (2, 9, 32)
