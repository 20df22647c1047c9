"""Jumbo: sizes and costs, an independent forward pass, weights, grids, and timm's contract."""

from __future__ import annotations

import copy
import io
import math
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from torch import Tensor

import zoo
from zoo.adapters.hollow import hollow
from zoo.cost.counters import fvcore_gmacs, torch_gmacs
from zoo.errors import ZooError
from zoo.models.jumbo import Jumbo

# Width, J, heads, parameters, GMACs at 224 and 128 pixels, millions of parameters unshared.
SIZES = {
    "pico": (96, 6, 3, 4_779_496, 0.4038, 0.1361, 34),
    "nano": (128, 6, 4, 8_141_800, 0.6693, 0.2346, 60),
    "tiny": (192, 6, 3, 17_520_616, 1.3967, 0.5111, 134),
    "small": (384, 6, 6, 66_890_728, 5.1504, 1.9778, 534),
    "base": (768, 3, 12, 131_407_336, 18.0903, 6.1539, 599),
}
TINY: dict[str, Any] = dict(
    img_size=32, patch_size=4, embed_dim=48, depth=3, num_heads=3, num_classes=10, jumbo_tokens=4
)
KINDS: dict[str, dict[str, Any]] = {
    "shared": {},
    "unshared": {"jumbo_mlp": "unshared"},
    "none": {"jumbo_mlp": "none"},
    "lora": {"jumbo_lora": 2},
    "narrow": {"jumbo_mlp_ratio": 2.0, "mlp_ratio": 2},
}
kinds = pytest.mark.parametrize("kind", KINDS)


def make(kind: str = "shared", seed: int = 0, **overrides: Any) -> Jumbo:
    """A tiny Jumbo with lively weights, in evaluation mode."""
    torch.manual_seed(seed)
    model = Jumbo(**{**TINY, **KINDS[kind], **overrides})
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def pictures(batch: int = 2, height: int = 32, width: int = 32) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


# ---------------------------------------------------------------------------- sizes and costs


@pytest.mark.parametrize("size", SIZES)
def test_parameters_and_macs_are_the_published_ones(size: str) -> None:
    width, slots, heads, params, at224, at128, unshared = SIZES[size]
    name = f"jumbo_{size}_patch16_224"
    with hollow():
        model = timm.create_model(name)
        apart = timm.create_model(name, jumbo_mlp="unshared")
    assert (model.embed_dim, model.jumbo_tokens) == (width, slots)
    assert (model.num_prefix_tokens, model.blocks[0].attn.num_heads) == (slots, heads)
    cost = zoo.profile(model)
    assert cost.params == params
    assert round(cost.gmacs, 4) == at224
    assert round(zoo.profile(model, img_size=128).gmacs, 4) == at128
    assert round(zoo.profile(apart).params / 1e6) == unshared
    assert zoo.profile(apart).macs == cost.macs == formula(width, slots)


def formula(width: int, slots: int, n: int = 196, depth: int = 12, classes: int = 1000) -> int:
    t = n + slots
    block = 4 * t * width**2 + 2 * t**2 * width + 8 * n * width**2 + 8 * slots**2 * width**2
    return 3 * 16**2 * n * width + depth * block + (slots + 1) * width * classes


@kinds
def test_three_counts_agree(kind: str) -> None:
    model = make(kind)
    ours = zoo.profile(model).gmacs
    assert fvcore_gmacs(model, pictures()) == pytest.approx(ours, rel=1e-6)
    assert torch_gmacs(model, pictures()) == pytest.approx(ours, rel=1e-6)


def test_zoo_lists_them() -> None:
    names = {f"jumbo_{size}_patch16_224" for size in SIZES} | {"jumbo_digits"}
    assert names <= set(zoo.list_models("jumbo*")) and names <= set(zoo.list_models())


# ---------------------------------------------------------------------------- the forward pass


def reference(model: Jumbo, images: Tensor) -> Tensor:
    """The specification, written down once more with nothing but tensors."""
    w = model.state_dict()
    slots, width = w["jumbo_token"].shape[1:]
    heads = model.blocks[0].attn.num_heads
    batch = images.shape[0]

    def norm(x: Tensor, name: str) -> Tensor:
        mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
        return (x - mean) / (var + 1e-5).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", torch.zeros(()))

    def low_rank(x: Tensor, name: str) -> Tensor:
        if f"{name}.down.weight" not in w:
            return torch.zeros(())
        return linear(linear(x, f"{name}.down"), f"{name}.up")

    def mlp(x: Tensor, name: str, extra: str = "") -> Tensor:
        hidden = linear(x, f"{name}.fc1") + low_rank(x, f"{extra}.fc1")
        hidden = 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))
        return linear(hidden, f"{name}.fc2") + low_rank(hidden, f"{extra}.fc2")

    patch = w["patch_embed.proj.weight"].shape[-1]
    columns = F.unfold(images, patch, stride=patch).transpose(1, 2)
    p = columns @ w["patch_embed.proj.weight"].flatten(1).T + w["patch_embed.proj.bias"]
    s = torch.cat([w["jumbo_token"].expand(batch, -1, -1), p + w["pos_embed"]], 1)
    for i in range(len(model.blocks)):
        b = f"blocks.{i}"
        qkv = linear(norm(s, f"{b}.norm1"), f"{b}.attn.qkv").unflatten(2, (3, heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        map_ = (q @ k.transpose(2, 3) / math.sqrt(width // heads)).softmax(-1)
        s = s + linear((map_ @ v).transpose(1, 2).flatten(2), f"{b}.attn.proj")
        wide, p = s[:, :slots].reshape(batch, slots * width), s[:, slots:]
        own = f"{b}.jumbo_mlp" if f"{b}.jumbo_mlp.fc1.weight" in w else "jumbo_mlp"
        if f"{own}.fc1.weight" in w:
            wide = wide + mlp(norm(wide, f"{b}.norm3"), own, f"{b}.jumbo_lora")
        p = p + mlp(norm(p, f"{b}.norm2"), f"{b}.mlp")
        s = torch.cat([wide.view(batch, slots, width), p], 1)
    f = norm(s, "norm")
    pooled = torch.cat([f[:, :slots].reshape(batch, -1), f[:, slots:].mean(1)], 1)
    return linear(pooled, "head")


@kinds
def test_forward_is_what_the_specification_says(kind: str) -> None:
    model = make(kind).double()
    x = pictures().double()
    with torch.no_grad():
        assert torch.allclose(model(x), reference(model, x), atol=1e-10)


def test_every_trained_weight_gets_a_gradient() -> None:
    """What distributed training needs; only the class token, never used, is frozen."""
    for kind in KINDS:
        model = make(kind, drop_path_rate=0.0).train()
        model(pictures()).square().mean().backward()
        frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
        assert frozen == {"cls_token"}
        for name, p in model.named_parameters():
            assert name == "cls_token" or p.grad.abs().max() > 0, (kind, name)


def test_the_shared_mlp_is_one_module_also_in_copies() -> None:
    model, x = make("lora"), pictures()
    assert sum("jumbo_mlp" in name for name, _ in model.named_parameters()) == 4
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
    ):
        assert all(b.wide_mlp is twin.jumbo_mlp for b in twin.blocks)
        assert twin.jumbo_mlp is not model.jumbo_mlp
        with torch.no_grad():
            assert torch.equal(twin(x), model(x))
            twin.jumbo_mlp.fc2.bias.add_(1.0)
            assert not torch.equal(twin(x), model(x))
    other = {k: v * 1.5 for k, v in model.state_dict().items()}
    swapped = torch.func.functional_call(model, other, (x,))
    with torch.no_grad():
        model.load_state_dict(other)
        assert torch.allclose(swapped, model(x), atol=1e-5)


@pytest.mark.parametrize("kind", ["shared", "lora"])
def test_runs_compiled_exported_checkpointed_and_in_bfloat16(kind: str) -> None:
    model, x = make(kind, depth=2), pictures()
    with torch.no_grad():
        expected = model(x)
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        assert torch.allclose(compiled(x), expected, atol=1e-5)
        batch = torch.export.Dim("batch", min=2, max=16)
        program = torch.export.export(model, (pictures(3),), dynamic_shapes={"x": {0: batch}})
        assert torch.allclose(program.module()(x), expected, atol=1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            assert (model(x).float() - expected).abs().max() < 0.2 * expected.abs().max()
    model.set_grad_checkpointing()
    assert torch.equal(model(x), expected)


# ---------------------------------------------------------------------------- initialisation


def test_initialisation() -> None:
    torch.manual_seed(0)
    model = timm.create_model("jumbo_pico_patch16_224", num_classes=50)
    for weight in (model.pos_embed, model.jumbo_token, model.jumbo_mlp.fc1.weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert model.jumbo_mlp.fc1.bias.abs().max() == 0
    bound = 1 / math.sqrt(3 * 16 * 16)
    assert 0.95 * bound < model.patch_embed.proj.weight.abs().max() <= bound
    with torch.no_grad():
        logits = model(torch.randn(2, 3, 224, 224))
    assert torch.allclose(logits, torch.full((2, 50), -math.log(50)))
    assert all(n.eps == 1e-5 for n in model.modules() if isinstance(n, torch.nn.LayerNorm))
    assert model.init_weights("jax") is None and model.head.weight.abs().max() == 0


def test_low_rank_parts_start_at_nothing() -> None:
    torch.manual_seed(0)
    model = Jumbo(**TINY, jumbo_lora=3)
    plain = Jumbo(**TINY)
    state = {k: v for k, v in model.state_dict().items() if "lora" not in k}
    plain.load_state_dict(state)
    with torch.no_grad():
        x = pictures()
        assert torch.equal(model.eval().forward_features(x), plain.eval().forward_features(x))
    assert model.blocks[0].jumbo_lora["fc1"].down.weight.abs().max() > 0


def test_drop_paths_have_one_rate_or_a_ramp() -> None:
    def rates(model: Jumbo) -> list[float]:
        paths = [(b.drop_path1, b.drop_path2, b.drop_path3) for b in model.blocks]
        assert all(len({getattr(p, "drop_prob", 0.0) for p in block}) == 1 for block in paths)
        return [round(getattr(block[0], "drop_prob", 0.0), 6) for block in paths]

    assert rates(Jumbo(**TINY)) == [0.1] * 3
    assert rates(Jumbo(**TINY, drop_path_rate=0.2, drop_path_ramp=True)) == [0.0, 0.1, 0.2]
    assert rates(Jumbo(**TINY, drop_path_rate=0.0)) == [0.0] * 3


# ---------------------------------------------------------------------------- grids


def test_another_size_and_back_is_the_same_model() -> None:
    model, x = make(), pictures()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torch.no_grad():
        before = model(x)
    # 4x16 has as many patches as 8x8; the wider grids have more.
    for size in ((16, 64), (20, 40), (48, 48), (16, 64)):
        model.set_input_size(size)
        grid = (size[0] // 4, size[1] // 4)
        dynamic = make(dynamic_img_size=True)
        y = pictures(2, *size)
        with torch.no_grad():
            assert torch.equal(model(y), dynamic(y))
            assert model.attention_map(y).shape == (2, *grid)
        assert zoo.wrap(model, None).grid == grid
    assert any(p is model.pos_embed for p in optimizer.param_groups[0]["params"])
    model(y).sum().backward()
    assert model.pos_embed.grad.abs().max() > 0
    model.set_input_size((32, 32))
    with torch.no_grad():
        assert torch.equal(model(x), before)


def test_the_resampled_table_is_bicubic_and_antialiased() -> None:
    model = make()
    model.set_input_size((20, 40))
    x = pictures(2, 20, 40)
    table = model.pos_embed.reshape(1, 8, 8, 48).permute(0, 3, 1, 2)
    table = F.interpolate(table, (5, 10), mode="bicubic", antialias=True)
    with torch.no_grad():
        got = model.embed_patches(x) - model.patch_embed(x)
    assert torch.allclose(got[0], table.flatten(2).transpose(1, 2)[0], atol=1e-5)


def test_rectangular_models_and_another_patch_size() -> None:
    model = make(img_size=(24, 40))
    with torch.no_grad():
        assert model(pictures(2, 24, 40)).shape == (2, 10)
        assert model.forward_dense(pictures(2, 24, 40)).map.shape == (2, 48, 6, 10)
        model.set_input_size(patch_size=8)
        assert model.patch_embed.grid_size == (3, 5) and model.pos_grid == (6, 10)
        assert model(pictures(2, 24, 40)).isfinite().all()


def test_the_attention_map_is_that_of_the_wide_token() -> None:
    model, x = make(), pictures()
    seen = {}
    model.blocks[-1].attn.register_forward_pre_hook(lambda m, a: seen.update(x=a[0]))
    with torch.no_grad():
        model(x)
        attn = model.blocks[-1].attn
        q, k, _ = attn.qkv(seen["x"]).unflatten(2, (3, 3, 16)).permute(2, 0, 3, 1, 4)
        rows = (q @ k.transpose(2, 3) / 4).softmax(-1)[:, :, :4, 4:]
        map_ = model.attention_map(x)
    assert torch.allclose(map_, rows.mean((1, 2)).view(2, 8, 8), atol=1e-6)
    assert (map_.sum((1, 2)) < 1).all()


# ---------------------------------------------------------------------------- timm's contract


def test_a_new_head_starts_at_the_prior() -> None:
    model = make().to(torch.float64)
    model.reset_classifier(7)
    assert model.head.weight.dtype == torch.float64 and model.num_classes == 7
    with torch.no_grad():
        assert torch.allclose(model(pictures().double()), torch.tensor(-math.log(7)).double())
    model.reset_classifier(0)
    assert model(pictures().double()).shape == (2, 5 * 48)
    model.reset_classifier(0, "")
    assert model(pictures().double()).shape == (2, 68, 48)
    with pytest.raises(ZooError, match="global_pool='jumbo'"):
        model.reset_classifier(7)
    model.reset_classifier(7, "jumbo")
    assert model(pictures().double()).shape == (2, 7)


def test_features_for_dense_tasks() -> None:
    model, x = make(), pictures()
    with torch.no_grad():
        map_, wide = model.forward_dense(x)
        features = model.forward_features(x)
        assert torch.equal(map_.flatten(2).transpose(1, 2), features[:, 4:])
        assert torch.equal(wide, features[:, :4].reshape(2, 4 * 48))
        [last] = model.forward_intermediates(x, 1, norm=True, intermediates_only=True)
        assert torch.equal(last, map_)
    net = timm.create_model(
        "jumbo_pico_patch16_224", features_only=True, img_size=64, out_indices=(3, 11)
    )
    assert [tuple(f.shape) for f in net(torch.randn(1, 3, 64, 64))] == [(1, 96, 4, 4)] * 2


def test_tokens_of_another_tokenizer_and_visible_patches_only() -> None:
    model, x = make(), pictures()
    with torch.no_grad():
        patches = model.embed_patches(x)
        assert torch.equal(model.forward_tokens(patches), model.forward_features(x))
        keep = torch.stack([torch.randperm(64)[:16] for _ in range(2)])
        seen = model.forward_tokens(patches, keep)
        order = keep.flip(1)
        again = model.forward_tokens(patches, order)
        assert model.forward_tokens(torch.randn(2, 11, 48)).shape == (2, 15, 48)
    assert seen.shape == (2, 20, 48)
    assert torch.allclose(seen[:, :4], again[:, :4], atol=1e-5)


def test_optimisers_leave_tokens_and_positions_undecayed() -> None:
    model = zoo.create_model("jumbo_digits")
    optimizer = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05)
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    backbone = model.unwrap()
    assert decay[id(backbone.jumbo_token)] == decay[id(backbone.pos_embed)] == 0
    assert decay[id(backbone.jumbo_mlp.fc1.weight)] == 0.05
    assert id(backbone.cls_token) not in decay
    groups = param_groups_layer_decay(model, layer_decay=0.5)
    scale = {id(p): g["lr_scale"] for g in groups for p in g["params"]}
    assert scale[id(backbone.jumbo_token)] < scale[id(backbone.blocks[0].mlp.fc1.weight)]
    assert scale[id(backbone.jumbo_mlp.fc1.weight)] >= scale[id(backbone.blocks[-1].norm3.weight)]


def test_patch_dropping() -> None:
    model, x = make(patch_drop_rate=0.9).train(), pictures(3)
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda m, a: seen.append(a[0].detach()))
    torch.manual_seed(0)
    model(x)
    everything = model._pos_embed(model.patch_embed(x))
    assert seen[0].shape[1] == 4 + 64 - int(0.9 * 64)
    assert torch.equal(seen[0][:, :4], everything[:, :4])
    kept = [
        [int((everything[b] == row).all(-1).nonzero()) for row in seen[0][b, 4:]] for b in range(3)
    ]
    assert all(len(set(rows)) == 7 for rows in kept) and len({tuple(sorted(r)) for r in kept}) == 3
    model.set_patch_drop(0.1)
    model(x)
    assert seen[1].shape[1] == 4 + 58
    model.eval()(x)
    assert seen[2].shape[1] == 68
    with pytest.raises(ZooError, match=r"in \[0, 1\), got 1"):
        model.set_patch_drop(1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"jumbo_tokens": 0}, "jumbo_tokens must be 1 or more, got 0"),
        ({"jumbo_mlp": "both"}, "jumbo_mlp must be one of"),
        ({"jumbo_mlp": "unshared", "jumbo_lora": 8}, "addition to a shared MLP"),
        ({"global_pool": "avg"}, "global_pool='jumbo', or not at all"),
        ({"global_pool": ""}, "a head of 10 classes needs"),
        ({"patch_drop_rate": 1.0}, "patch_drop_rate must be in"),
    ],
)
def test_refusals(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ZooError, match=message):
        Jumbo(**{**TINY, **arguments})


def test_the_digits_model_starts_with_waves_as_positions() -> None:
    torch.manual_seed(0)
    model = zoo.create_model("jumbo_digits")
    table = model.unwrap().pos_embed
    assert table.shape[1] == 64 and 0.99 < table.abs().max().item() <= 1
    assert model(torch.randn(2, 1, 16, 16)).shape == (2, 10)


def test_the_patch_drop_follows_the_steps_of_a_run() -> None:
    from zoo.lit.patch_drop import PatchDropRamp

    ramp, model = PatchDropRamp(0.9, 0.1), make().train()
    module: Any = SimpleNamespace(net=zoo.wrap(model, None))
    rates = []
    for step in (0, 2, 4):
        trainer: Any = SimpleNamespace(global_step=step, estimated_stepping_batches=5)
        ramp.on_fit_start(trainer, module)
        ramp.on_train_batch_start(trainer, module, None, 0)
        rates.append(round(model.patch_drop.rate, 6))
    assert rates == [0.9, 0.5, 0.1]
    with pytest.raises(ZooError, match="callbacks=patch_drop works on a Jumbo"):
        ramp.on_fit_start(trainer, SimpleNamespace(net=timm.create_model("test_vit")))
    with pytest.raises(ZooError, match="start of the patch drop must be in"):
        PatchDropRamp(1.0)
