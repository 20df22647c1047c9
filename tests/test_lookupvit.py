"""LookupViT: published cost, and the properties that a two-stream model must have.

There are no reference weights and there is no official code, so the oracle is the specification:
formulas for cost and parameters, and identities that hold for any weights.
"""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import zoo
from tests.cases import images
from zoo.adapters.hollow import hollow
from zoo.cost.counters import fvcore_gmacs, torch_gmacs
from zoo.errors import UnsupportedModel, ZooError
from zoo.models.lookupvit import (
    LookupBlock,
    LookupViT,
    Streams,
    resize_grid,
    resize_matrix,
    warm_start,
)

SIZES = {"img_size": 32, "patch_size": 4, "embed_dim": 48, "depth": 3, "num_heads": 3}
SIZES |= {"num_classes": 10, "mlp_ratio": 2}
EXACT_BASE = {3: 6671984640, 5: 8467408896, 7: 11178240000, 10: 17009258496}
TABLE = {  # GMACs at 3x3 ... 10x10, parameters
    "tiny": ((0.45, 0.51, 0.58, 0.67, 0.78, 0.91, 1.05, 1.22), 9042704),
    "small": ((1.71, 1.92, 2.18, 2.51, 2.90, 3.36, 3.88, 4.46), 34893392),
    "base": ((6.67, 7.46, 8.47, 9.71, 11.18, 12.88, 14.83, 17.01), 137024720),
    "large": ((23.42, 26.17, 29.72, 34.06, 39.21, 45.17, 51.96, 59.57), None),
}


def model(seed: int = 0, **options) -> LookupViT:
    """A tiny LookupViT (8x8 patches) with weights that are not at their nearly dead start."""
    torch.manual_seed(seed)
    return shaken(LookupViT(**{**SIZES, "lookup_mlp_ratio": 0.5, **options}))


def shaken(m: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in m.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return m.eval()


def big(size: str) -> zoo.ReducedViT:
    with hollow():
        return zoo.create_model(f"lookupvit_{size}_patch16_224")


def streams(batch: int = 2, n: int = 64, m: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return (
        torch.randn(batch, n, 48, generator=generator),
        torch.randn(batch, m, 48, generator=generator),
    )


# ---------------------------------------------------------------------------- 1: cost


@pytest.mark.parametrize("size", TABLE)
def test_cost_and_parameters_of_the_specification(size: str) -> None:
    m = big(size)
    gmacs, params = TABLE[size]
    for grid, expected in zip(range(3, 11), gmacs, strict=True):
        m.unwrap().set_compressed_grid(grid)
        found = zoo.profile(m)
        assert round(found.gmacs, 2) == expected
        if size == "base" and grid in EXACT_BASE:
            assert found.macs == EXACT_BASE[grid]
    assert params is None or zoo.profile(m).params == params


@pytest.mark.parametrize("grid", [3, 5, 7, (2, 6)])
@pytest.mark.parametrize("mode", ["avg", "compressed", "lookup"])
def test_counters_see_exactly_the_formula(grid, mode) -> None:
    m = zoo.wrap(model(compressed_grid=grid, head_mode=mode), None).eval()
    d, n, tokens = 48, 64, grid * grid if isinstance(grid, int) else grid[0] * grid[1]
    block = (2 * tokens + 2 * n) * d * d + 2 * n * tokens * d  # gather
    block += (4 + 2 * 2) * tokens * d * d + 2 * tokens * tokens * d  # refine
    look = (tokens + n) * d * d + n * tokens * d + n * d * d  # infuse, lookup MLP
    expected = 3 * 16 * n * d + 3 * (block + look) + 2 * d * 10
    expected -= {"avg": 0, "compressed": look + d * 10, "lookup": d * 10}[mode]
    assert zoo.profile(m).macs == expected
    assert fvcore_gmacs(m, images(2)) * 1e9 == pytest.approx(expected, abs=0.5)
    assert torch_gmacs(m, images(2)) * 1e9 == pytest.approx(expected, abs=0.5)


def test_skipping_the_last_lookup_update_saves_what_it_should() -> None:
    m = big("base")
    saved = []
    for grid in (3, 5, 7, 10):
        m.unwrap().set_compressed_grid(grid)
        m.unwrap().set_head_mode("avg")
        full = zoo.profile(m).gmacs
        m.unwrap().set_head_mode("compressed")
        saved.append(round(full - zoo.profile(m).gmacs, 2))
    assert saved == [0.24, 0.25, 0.27, 0.31]


# ---------------------------------------------------------------------------- 2: resizing


def test_resize_is_the_antialiased_bilinear_one() -> None:
    for n, m in ((14, 3), (14, 5), (14, 13), (14, 14), (8, 1), (7, 6), (64, 5)):
        matrix = resize_matrix(n, m, dtype=torch.float64)
        assert torch.allclose(matrix.sum(1), torch.ones(m, dtype=torch.float64), atol=1e-14)
        x = torch.randn(2, 3, n, 9, dtype=torch.float64)
        expected = F.interpolate(x, size=(m, 4), mode="bilinear", antialias=True)
        assert torch.allclose(resize_grid(x, (m, 4)), expected, atol=1e-14)
        columns = resize_matrix(9, 4, dtype=torch.float64)
        by_matrix = torch.einsum("ih,bchw,jw->bcij", matrix, x, columns)
        assert torch.allclose(resize_grid(x, (m, 4)), by_matrix, atol=1e-14)
    first, third = resize_matrix(14, 5)[[0, 2]]
    assert torch.allclose(first[:4], torch.tensor([0.2714, 0.3857, 0.2429, 0.1]), atol=5e-5)
    expected = torch.tensor([0.0385, 0.1667, 0.2949, 0.2949, 0.1667, 0.0385])
    assert torch.allclose(third[4:10], expected, atol=5e-5) and third[:4].abs().max() == 0
    x = torch.randn(1, 2, 6, 7)
    assert torch.equal(resize_grid(x, (6, 7)), x)
    constant = resize_grid(torch.full((1, 2, 14, 14), 0.3), (5, 9))
    assert torch.allclose(constant, torch.full((1, 2, 5, 9), 0.3))
    half = resize_grid(torch.randn(1, 2, 14, 14).bfloat16(), (5, 5))
    assert half.dtype == torch.bfloat16


# ---------------------------------------------------------------------------- 3: attention


def test_infusion_uses_the_stored_weights_and_the_refined_tokens() -> None:
    block: LookupBlock = model().blocks[0]
    lookup, compressed = streams()
    with torch.no_grad():
        update, attn = block.gather(lookup, compressed)
        assert attn.shape == (2, 3, 9, 64)
        assert torch.allclose(attn.sum(-1), torch.ones(2, 3, 9), atol=1e-6)
        refined = block.refine(compressed + update)
        infused = block.infuse(refined, attn)
        # By hand: the same weights, transposed, not normalised again.
        value = block.infuse.norm(block.infuse.v(refined)).unflatten(2, (3, 16))
        by_hand = torch.einsum("bhmn,bmhd->bnhd", attn, value).flatten(2)
        assert torch.allclose(block.infuse.proj(by_hand), infused, atol=1e-6)
        block.gather.q.weight.zero_()
        assert torch.equal(block.infuse(refined, attn), infused)
        expected, _ = block(lookup, compressed)
        assert not torch.allclose(expected, lookup + infused, atol=1e-3)
        # Silence the refinement: what is infused changes.
        for part in (block.refine.attn.proj, block.refine.mlp.fc2):
            part.weight.zero_(), part.bias.zero_()
        silent, _ = block(lookup, compressed)
        assert (silent - expected).abs().max() > 1e-3


def test_options_of_the_cross_attention() -> None:
    lookup, compressed = streams()
    for placement in ("post", "pre"):
        block = shaken(LookupBlock(48, 3, placement=placement, renormalise=True))
        with torch.no_grad():
            _, attn = block.gather(lookup, compressed)
            infused = block.infuse(compressed, attn)
            plain = LookupBlock(48, 3, placement=placement).eval()
            plain.load_state_dict(block.state_dict())
            scaled = plain.infuse(compressed, attn / attn.sum(2, keepdim=True))
        assert torch.allclose(infused, scaled, atol=1e-6)
        assert sum(p.numel() for p in block.parameters()) == 19 * 48**2 + 28.5 * 48
    post, pre = model(norm_placement="post"), model(norm_placement="pre")
    pre.load_state_dict(post.state_dict())
    assert not torch.allclose(post(images()), pre(images()), atol=1e-3)
    with pytest.raises(ZooError, match="norm_placement must be one of"):
        model(norm_placement="before")


# ---------------------------------------------------------------------------- 4: warm start


def silence(m: LookupViT) -> None:
    with torch.no_grad():
        for block in m.blocks:
            for part in (block.gather.proj, block.infuse.proj, block.lookup_mlp.fc2):
                part.weight.zero_(), part.bias.zero_()


def test_silent_streams_are_a_vit_and_an_identity() -> None:
    m, x = model(compressed_grid=(3, 5)), images()
    silence(m)
    with torch.no_grad():
        tokens = m.patch_embed(x) + m.pos_embed
        small = resize_grid(tokens, (3, 5)).flatten(2).transpose(1, 2)
        for block in m.blocks:
            small = block.refine(small)
        found = m.forward_features(x)
    assert torch.equal(found.compressed, m.norm(small))
    assert torch.equal(found.lookup, m.norm_lookup(tokens.flatten(2).transpose(1, 2)))


def vit(**options) -> VisionTransformer:
    torch.manual_seed(3)
    args = {**SIZES, "class_token": False, "global_pool": "avg", **options}
    return shaken(VisionTransformer(**args))


def on_grid(v: VisionTransformer, x: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Logits of a ViT without prefix tokens on its resized token grid."""
    tokens = v.patch_embed(x) + v.pos_embed[:, v.num_prefix_tokens :]
    tokens = resize_grid(tokens.transpose(1, 2).unflatten(2, (8, 8)), grid)
    tokens = v.norm(v.blocks(tokens.flatten(2).transpose(1, 2)))
    return v.head(v.fc_norm(tokens.mean(1)))


@pytest.mark.parametrize(
    "options", [{}, {"init_values": 0.3}, {"qkv_bias": False}, {"fc_norm": False}]
)
def test_warm_start_begins_exactly_as_the_vit_on_the_resized_grid(options) -> None:
    v, x = vit(**options), images()
    m = model(fc_norm=options.get("fc_norm", True), head_mode="compressed")
    assert warm_start(m, v) is m
    with torch.no_grad():
        for grid in ((3, 3), (2, 7), (8, 8)):
            assert torch.allclose(m(x, grid), on_grid(v, x, grid), atol=2e-6)
        assert torch.allclose(m(x, 8), v(x), atol=2e-6)
        # The other head starts at zero, so the mean of both names the same classes.
        m.set_head_mode("avg")
        assert torch.allclose(2 * m(x, 3), on_grid(v, x, (3, 3)), atol=2e-6)


def test_warm_start_leaves_prefix_tokens_out_and_resamples_positions() -> None:
    x = images()
    v = vit(class_token=True, global_pool="token", reg_tokens=2)
    m = model(head_mode="compressed")
    warm_start(zoo.wrap(m, None), zoo.wrap(v, None))
    v.global_pool = "avg"
    with torch.no_grad():
        assert torch.allclose(m(x, 4), on_grid(v, x, (4, 4)), atol=2e-6)
    larger = model(img_size=48, fc_norm=True)
    warm_start(larger, vit())
    assert larger.pos_embed.shape == (1, 48, 12, 12)
    other = vit(num_classes=7)
    head = copy.deepcopy(m.head.weight)
    warm_start(model(fc_norm=True), other)
    assert torch.equal(m.head.weight, head)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 2}, "same depth"),
        ({"depth": 4}, "no place for the ViT's blocks.3"),
        ({"mlp_ratio": 4}, "of the same sizes"),
        ({"qk_norm": True}, "no place for the ViT's blocks.0.attn.q_norm"),
        ({"fc_norm": False}, "fc_norm=False"),
    ],
)
def test_warm_start_refuses_what_it_cannot_take_over(options, message) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        warm_start(model(fc_norm=True), vit(**options))


def test_weights_of_the_shipped_vit_are_a_warm_start(tmp_path) -> None:
    from zoo.checkpoint import find, load_weights
    from zoo.errors import BadCheckpoint

    m = zoo.create_model("lookupvit_digits")
    load_weights(m, find("vit_digits"))
    source = zoo.load("vit_digits").unwrap()
    found = m.unwrap()
    assert torch.equal(found.blocks[5].refine.mlp.fc2.weight, source.blocks[5].mlp.fc2.weight)
    assert torch.equal(found.head.weight, source.head.weight)
    with pytest.raises(BadCheckpoint, match="fc_norm=False"):
        load_weights(zoo.create_model("lookupvit_digits", fc_norm=True), find("vit_digits"))


# ---------------------------------------------------------------------------- 5: permutation


def test_lookup_tokens_have_no_order() -> None:
    m = model().double()
    lookup, compressed = (tokens.double() for tokens in streams())
    order = torch.randperm(64)
    with torch.no_grad():
        one, two = (lookup, compressed), (lookup[:, order], compressed)
        for block in m.blocks:
            one, two = block(*one), block(*two)
    assert torch.allclose(one[0][:, order], two[0], atol=1e-12)
    assert torch.allclose(one[1], two[1], atol=1e-12)


# ---------------------------------------------------------------------------- 6: every grid


def test_one_set_of_weights_runs_at_every_grid() -> None:
    m, x = model(), images()
    before = {k: v.clone() for k, v in m.state_dict().items()}
    seen = []
    with torch.no_grad():
        for grid in [*((s, s) for s in range(1, 9)), (1, 8), (8, 3), (2, 5)]:
            logits = m(x, grid)
            features = m.forward_features(x, grid)
            assert features.compressed.shape == (2, grid[0] * grid[1], 48)
            assert features.lookup.shape == (2, 64, 48)
            m.set_compressed_grid(grid)
            assert torch.equal(m(x), logits) and logits.isfinite().all()
            seen.append(logits)
    assert all(not torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])
    assert all(torch.equal(v, before[k]) for k, v in m.state_dict().items())
    sized = {k for k, v in model(img_size=16).state_dict().items() if v.shape != before[k].shape}
    assert sized == {"pos_embed"}
    assert set(model(compressed_grid=2).state_dict()) == set(before)


def test_a_forward_stores_nothing() -> None:
    m = model()
    before = {name: dict(vars(part)) for name, part in m.named_modules()}
    m(images(), compressed_grid=3)
    m.training_logits(images())
    for name, part in m.named_modules():
        assert all(vars(part)[key] is value for key, value in before[name].items()), name
        assert vars(part).keys() == before[name].keys()


@pytest.mark.parametrize("grid", [0, 9, (3, 9), (0, 2)])
def test_impossible_grids_are_refused(grid) -> None:
    with pytest.raises(ZooError, match="between 1x1 and the patch grid 8x8"):
        model(compressed_grid=grid)
    with pytest.raises(ZooError, match="between 1x1 and the patch grid 8x8"):
        model()(images(), compressed_grid=grid)


# ---------------------------------------------------------------------------- 7: heads


def test_heads() -> None:
    m, x = model(), images()
    with torch.no_grad():
        compressed, lookup = m.training_logits(x)
        assert torch.equal(m(x), (compressed + lookup) / 2)
        features = m.forward_features(x)
        assert torch.equal(m.forward_head(features), m(x))
        assert m.forward_head(features, pre_logits=True).shape == (2, 48)
        m.set_head_mode("lookup")
        assert torch.equal(m(x), lookup)
        m.set_head_mode("compressed")
        # The last infusion and lookup MLP do not run, and are not missed.
        calls = []
        m.blocks[-1].lookup_mlp.register_forward_hook(lambda *_: calls.append(1))
        m.blocks[-1].infuse.register_forward_hook(lambda *_: calls.append(1))
        assert torch.equal(m(x), compressed) and not calls
        assert torch.equal(m.training_logits(x)[0], compressed) and not calls
        assert torch.equal(m.forward_features(x).lookup, features.lookup)
    with pytest.raises(ZooError, match="head_mode must be one of"):
        m.set_head_mode("both")


# ---------------------------------------------------------------------------- 8: gradients


def test_gradients_reach_what_they_should() -> None:
    m = model().train()
    labels = torch.tensor([1, 7])
    sum(F.cross_entropy(logits, labels) for logits in m.training_logits(images())).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in m.parameters())
    m.zero_grad(set_to_none=True)
    m.set_head_mode("compressed")
    F.cross_entropy(m(images()), labels).backward()
    without = {name for name, p in m.named_parameters() if p.grad is None}
    last = ("blocks.2.infuse.", "blocks.2.lookup_", "norm_lookup.", "head_lookup.")
    assert without == {name for name, _ in m.named_parameters() if name.startswith(last)}
    assert len(without) == 6 + 6 + 2 + 2


def test_checkpointing_and_drop_path_change_nothing_they_should_not() -> None:
    m, x = model().train(), images()
    grads = []
    for enable in (False, True):
        m.set_grad_checkpointing(enable)
        m.zero_grad(set_to_none=True)
        m(x).square().sum().backward()
        grads.append([p.grad.clone() for p in m.parameters()])
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*grads, strict=True))
    dropped = model(drop_path_rate=0.5, attn_drop_rate=0.2).train()
    rates = [getattr(b.drop_path, "drop_prob", 0.0) for b in dropped.blocks]
    assert rates == [0.0, 0.25, 0.5]
    assert not torch.equal(dropped(x), dropped(x)) and torch.equal(dropped.eval()(x), m.eval()(x))
    # What is dropped from the gathering is not dropped from the infusion.
    dropped.train()
    _, attn = dropped.blocks[0].gather(*streams())
    assert torch.allclose(attn.sum(-1), torch.ones(2, 3, 9), atol=1e-6)


# ---------------------------------------------------------------------------- 9: numerics


def test_precision_and_batches() -> None:
    m, x = model(), images(3)
    with torch.no_grad():
        single = m(x)
        double = copy.deepcopy(m).double()(x.double())
        assert double.dtype == torch.float64
        assert (single - double).abs().max() < 1e-5 * double.abs().max()
        alone = torch.cat([m(x[i : i + 1]) for i in range(3)])
        assert torch.allclose(single, alone, atol=2e-6)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            coarse = m(x)
            features = m.forward_features(x)
        assert (coarse.float() - single).abs().max() < 0.1 * single.abs().max()
        assert features.lookup.dtype == torch.float32
        assert copy.deepcopy(m).bfloat16()(x.bfloat16()).isfinite().all()


def test_copies_and_files() -> None:
    m, x = model(), images()
    with torch.no_grad():
        expected = m(x)
        assert torch.equal(copy.deepcopy(m)(x), expected)
        assert torch.equal(pickle.loads(pickle.dumps(m))(x), expected)
        buffer = io.BytesIO()
        torch.save(m.state_dict(), buffer)
        buffer.seek(0)
        again = model(seed=1)
        again.load_state_dict(torch.load(buffer, weights_only=True))
        assert torch.equal(again(x), expected)


def test_traces_without_breaks() -> None:
    m, x = model(compressed_grid=(3, 5)), images()
    with torch.no_grad():
        expected = m(x)
        traced = torch.compile(m, backend="eager", fullgraph=True)
        assert torch.equal(traced(x), expected)
        assert torch.equal(traced(x, compressed_grid=2), m(x, 2))
        shapes = {"x": {0: torch.export.Dim("batch", min=1, max=64)}}
        program = torch.export.export(m, (x,), dynamic_shapes=shapes)
        assert torch.allclose(program.module()(images(5)), m(images(5)), atol=2e-6)


# ---------------------------------------------------------------------------- timm


def test_timm_contract() -> None:
    names = zoo.list_models("lookupvit_*")
    assert {f"lookupvit_{s}_patch16_224" for s in TABLE} | {"lookupvit_digits"} == set(names)
    m = timm.create_model("lookupvit_tiny_patch16_224", img_size=64, depth=2, num_classes=5)
    assert m.compressed_grid == (4, 4)  # 5x5 where it fits
    assert m.default_cfg["classifier"] == ("head", "head_lookup")
    assert m.get_classifier() == (m.head, m.head_lookup)
    m.reset_classifier(3)
    assert m(torch.randn(1, 3, 64, 64)).shape == (1, 3) and m.num_classes == 3
    m.reset_classifier(0)
    assert m(torch.randn(1, 3, 64, 64)).shape == (1, 192)
    with pytest.raises(ZooError, match="global_pool='avg'"):
        m.reset_classifier(3, "token")
    groups = timm.models.group_parameters(m, m.group_matcher(), reverse=True)
    assert {groups[n] for n in ("pos_embed", "patch_embed.proj.weight")} == {0}
    assert groups["blocks.1.infuse.v.weight"] == 2 and m.no_weight_decay() == {"pos_embed"}
    wrapped = zoo.wrap(model(), None)
    groups = timm.models.group_parameters(wrapped, wrapped.group_matcher(), reverse=True)
    assert groups["backbone.pos_embed"] == groups["backbone.patch_embed.proj.weight"] == 0
    dynamic = model(dynamic_img_size=True)
    assert dynamic(torch.randn(1, 3, 24, 40), compressed_grid=(2, 7)).shape == (1, 10)


def test_feature_maps_of_both_streams() -> None:
    m, x = model(compressed_grid=(2, 3)), images()
    with torch.no_grad():
        final, maps = m.forward_intermediates(x, stream="both", norm=True)
        assert isinstance(final, Streams) and len(maps) == 3
        assert maps[0].lookup.shape == (2, 48, 8, 8)
        assert maps[0].compressed.shape == (2, 48, 2, 3)
        features = m.forward_features(x)
        assert torch.equal(maps[-1].lookup.flatten(2).transpose(1, 2), features.lookup)
        assert torch.equal(maps[-1].compressed.flatten(2).transpose(1, 2), features.compressed)
        assert torch.equal(final.lookup, features.lookup)
        [one] = m.forward_intermediates(
            x, [-2], stop_early=True, intermediates_only=True, output_fmt="NLC", norm=True
        )
        assert torch.equal(one, maps[1].lookup.flatten(2).transpose(1, 2))
        small = m.forward_intermediates(
            x, 1, intermediates_only=True, stream="compressed", compressed_grid=4
        )
        assert small[0].shape == (2, 48, 4, 4)
        assert zoo.wrap(m, None).eval().forward_intermediates(x, 2)[1][0].shape == (2, 48, 8, 8)
    with pytest.raises(ZooError, match="stream must be one of"):
        m.forward_intermediates(x, stream="all")
    with pytest.raises(ZooError, match="some of the 3 blocks"):
        m.forward_intermediates(x, [3])
    getter = timm.create_model("lookupvit_digits", features_only=True, out_indices=[1, 3])
    assert [tuple(f.shape) for f in getter(torch.randn(1, 1, 16, 16))] == [(1, 96, 8, 8)] * 2


# ---------------------------------------------------------------------------- in the zoo


def test_wrapper_runs_the_backbone_and_says_why_there_is_no_reducer() -> None:
    m, x = zoo.wrap(model(compressed_grid=3), None).eval(), images()
    with torch.no_grad():
        assert torch.equal(m(x), m.unwrap()(x)) and m.verify(x) == 0.0
        assert isinstance(m.forward_features(x), Streams)
    assert m.token_counts() == [(73, 73)] * 3 == zoo.profile(m).tokens
    assert "dense" not in str(zoo.profile(m)) and zoo.profile(m).dense is None
    assert zoo.profile(m, img_size=64).tokens[0] == (256 + 9, 256 + 9)
    sentence = "gathers its tokens into a compressed grid by itself and takes no reducer"
    with pytest.raises(ZooError, match=f"reducer 'tome' cannot be used here: .*{sentence}"):
        zoo.create_model("lookupvit_digits", "tome")
    with pytest.raises(ZooError, match=sentence):
        m(x, return_info=True)
    with pytest.raises(ZooError, match="expected images of 32x32, got 24x24"):
        m(images(1, size=24))
    with pytest.raises(ZooError, match="between 1x1 and the patch grid"):
        zoo.create_model("lookupvit_digits", compressed_grid=9)


def test_saved_models_keep_their_grid(tmp_path) -> None:
    from zoo.checkpoint import save_pretrained

    m = zoo.create_model("lookupvit_digits", compressed_grid=3).eval()
    assert m.recipe["backbone"]["args"]["compressed_grid"] == [3, 3]
    m.unwrap().set_compressed_grid((2, 5))
    m.unwrap().set_head_mode("compressed")
    save_pretrained(m, tmp_path / "model")
    again = zoo.load(tmp_path / "model")
    x = torch.randn(2, 1, 16, 16)
    with torch.no_grad():
        assert torch.equal(again(x), m(x)) and again.recipe == m.recipe
        other = zoo.load(tmp_path / "model", compressed_grid=4, head_mode="avg")
        m.unwrap().set_head_mode("avg")
        assert torch.equal(other(x), m.unwrap()(x, 4))


def test_rows_name_the_architecture_and_its_grid(tmp_path) -> None:
    from zoo.measure.describe import describe
    from zoo.report.words import summary_line
    from zoo.run.evaluate import count_costs

    m = zoo.create_model("lookupvit_digits", compressed_grid=(2, 4)).eval()
    row = {**describe(m), **count_costs(m)}
    assert row["method"] == "lookupvit" and row["reducer"] is None
    assert row["gmacs_fvcore"] == pytest.approx(row["gmacs"]["total"], rel=1e-9)
    assert row["gmacs_dense"] is None
    assert summary_line(row).startswith("lookupvit_digits grid 2x4 | 0.0")
    from zoo.report.compare import compare

    rows = []
    for grid in (2, 4, 8):
        m.unwrap().set_compressed_grid(grid)
        rows.append({**describe(m), **count_costs(m, trace=False), "top1": 90.0 + grid})
    [view] = compare([{**r, "dataset": "d", "trained": True} for r in rows]).views
    labels = [f"lookupvit (trained) grid {g}x{g}" for g in (8, 4, 2)]
    assert [entry.label for entry in view.entries] == labels
    assert not view.dense and not any("reducer=none" in note for note in view.notes)
