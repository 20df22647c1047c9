"""Weights are found in what training scripts write, whatever stands around and in front of them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import zoo
from tests.test_checkpoint import make
from tests.test_checkpoint_refusals import weights_refusal
from zoo.checkpoint import load_weights
from zoo.errors import ZooError

State = dict[str, Tensor]
SIZE = {"img_size": 64, "num_classes": 0}


def tower(seed: int = 7, **options) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model("test_vit", **{**SIZE, **options})


BODY: State = {k: v.detach().clone() for k, v in tower().state_dict().items()}
OTHER: State = {k: v.detach().clone() for k, v in tower(8).state_dict().items()}


def named(prefix: str, state: State = BODY) -> State:
    return {prefix + k: v for k, v in state.items()}


def inside(part: str, state: State = BODY) -> State:
    """The names after every third block was wrapped by itself."""
    return {
        k.replace("blocks.3.", f"blocks.3.{part}.").replace("blocks.0.", f"blocks.0.{part}."): v
        for k, v in state.items()
    }


def chunked(size: int, through: bool, state: State = BODY) -> State:
    def name(k: str) -> str:
        if not k.startswith("blocks."):
            return k
        _, i, rest = k.split(".", 2)
        block = int(i)
        return f"blocks.{block // size}.{block if through else block % size}.{rest}"

    return {name(k): v for k, v in state.items()}


def dino_head(prefix: str) -> State:
    return {
        f"{prefix}mlp.0.weight": torch.ones(4, 64),
        f"{prefix}mlp.0.bias": torch.ones(4),
        f"{prefix}last_layer.weight_g": torch.ones(3, 1),
        f"{prefix}last_layer.weight_v": torch.ones(3, 4),
    }


def moco_head(prefix: str) -> State:
    return {
        f"{prefix}head.0.weight": torch.ones(4, 64),
        f"{prefix}head.1.weight": torch.ones(4),
        f"{prefix}head.1.num_batches_tracked": torch.tensor(3),
        f"{prefix}head.3.weight": torch.ones(4, 4),
    }


def decoder() -> State:
    return {
        "mask_token": torch.zeros(1, 1, 8),
        "decoder_embed.weight": torch.zeros(8, 64),
        "decoder_pos_embed": torch.zeros(1, 17, 8),
        "decoder_blocks.0.norm1.weight": torch.zeros(8),
        "decoder_norm.weight": torch.zeros(8),
        "decoder_pred.bias": torch.zeros(8),
    }


def averaged(model: nn.Module) -> State:
    return AveragedModel(model).state_dict()


FILES: dict[str, Callable[[], object]] = {
    "DINO, whole": lambda: {
        "student": {**named("module.backbone.", OTHER), **dino_head("module.head.")},
        "teacher": {**named("backbone."), **dino_head("head.")},
        "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": []},
        "epoch": 9,
        "dino_loss": {"center": torch.zeros(1, 3)},
    },
    "DINO, the tower alone": lambda: BODY,
    "DINO, head in the tower": lambda: {"teacher": {**BODY, **dino_head("head.")}},
    "iBOT": lambda: {
        "teacher": {**named("module.backbone."), "module.backbone.masked_embed": torch.ones(1, 64)}
    },
    "DINOv2": lambda: {
        "teacher": {
            **named("backbone."),
            "backbone.mask_token": torch.ones(1, 64),
            **dino_head("dino_head."),
            **dino_head("ibot_head."),
        }
    },
    "DINOv2 in chunks": lambda: {"teacher": named("backbone.", chunked(2, True))},
    "DINOv2 in one chunk": lambda: {"teacher": named("backbone.", chunked(6, True))},
    "chunks that count anew": lambda: {"model": chunked(3, False)},
    "DINOv2 under FSDP": lambda: {
        "teacher": named(
            "backbone._fsdp_wrapped_module.", inside("_fsdp_wrapped_module", chunked(2, True))
        )
    },
    "MoCo v3": lambda: {
        "epoch": 3,
        "arch": "vit_small",
        "state_dict": {
            **named("module.momentum_encoder.", OTHER),
            **moco_head("module.momentum_encoder."),
            **named("module.base_encoder."),
            **moco_head("module.base_encoder."),
            "module.predictor.0.weight": torch.ones(4, 4),
        },
    },
    "MAE with decoder": lambda: {"model": {**BODY, **decoder()}, "scaler": {}, "epoch": 1},
    "MAE without decoder": lambda: {"model": BODY},
    "I-JEPA": lambda: {
        "encoder": named("module.", OTHER),
        "target_encoder": named("module."),
        "predictor": {"module.predictor_blocks.0.norm1.weight": torch.ones(8)},
    },
    "Lightning, model": lambda: {"state_dict": {**named("model."), "loss.weight": torch.ones(1)}},
    "Lightning, net": lambda: {"state_dict": named("net."), "pytorch-lightning_version": "2.5"},
    "Lightning, deep": lambda: {
        "state_dict": {**named("model.encoder.backbone."), "model.mlp.weight": torch.ones(2)}
    },
    "Lightning, averaged": lambda: {
        "state_dict": named("net."),
        "current_model_state": named("net.", OTHER),
    },
    "DDP": lambda: {"model": named("module.")},
    "compiled": lambda: named("_orig_mod."),
    "compiled and wrapped": lambda: named("module._orig_mod.module."),
    "blocks compiled one by one": lambda: inside("_orig_mod"),
    "Lightning, blocks compiled": lambda: {
        "state_dict": named("model._orig_mod.", inside("_orig_mod"))
    },
    "FSDP": lambda: {"model": named("_fsdp_wrapped_module.", inside("_fsdp_wrapped_module"))},
    "old FSDP": lambda: named("_fsdp_wrapped_module._fpw_module."),
    "activation checkpoints": lambda: inside("_checkpoint_wrapped_module"),
    "AveragedModel": lambda: averaged(tower()),
    "AveragedModel, compiled": lambda: {
        "model": {"n_averaged": torch.tensor(3), **named("module._orig_mod.")}
    },
    "DeepSpeed": lambda: {"module": BODY, "global_steps": 3},
    "EMA beside": lambda: {"model": OTHER, "ema": {"decay": 0.9, "module": BODY}},
    "EMA, timm": lambda: {"state_dict": OTHER, "state_dict_ema": named("module.")},
    "EMA, flat": lambda: {
        **named("online_model.", OTHER),
        **named("ema_model."),
        "initted": torch.tensor(True),
    },
    "twice": lambda: {"state_dict": {"model": {"state_dict": BODY}}},
}


@pytest.mark.parametrize("name", FILES)
def test_the_tower_is_found(tmp_path: Path, name: str) -> None:
    path = tmp_path / "file.pth"
    torch.save(FILES[name](), path)
    for model in (make("tome"), make().unwrap(), tower(9)):
        own = {k: v.clone() for k, v in model.state_dict().items() if "head." in k}
        load_weights(model, path, new_head="auto")
        got = model.unwrap() if hasattr(model, "unwrap") else model
        assert all(torch.equal(got.state_dict()[k], v) for k, v in BODY.items())
        assert all(torch.equal(model.state_dict()[k], v) for k, v in own.items())


@pytest.mark.parametrize(
    ("name", "expected"),
    [("DINO, whole", OTHER), ("EMA beside", OTHER), ("EMA, timm", OTHER), ("EMA, flat", OTHER),
     ("I-JEPA", OTHER), ("Lightning, averaged", OTHER), ("MoCo v3", BODY), ("DINOv2", BODY)],
)  # fmt: skip
def test_what_was_trained_rather_than_its_average(
    tmp_path: Path, name: str, expected: State
) -> None:
    path = tmp_path / "file.pth"
    torch.save(FILES[name](), path)
    model = load_weights(tower(9), path, ema=False)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in expected.items())


def test_a_wrapped_model_brings_its_reducer(tmp_path: Path) -> None:
    """What DDP, compilers and Lightning make of the names of a ReducedViT."""
    torch.manual_seed(0)
    source = zoo.create_model("test_vit", "dynamicvit", img_size=64, num_classes=7)
    state = source.state_dict()
    torch.manual_seed(1)
    for prefix in ("", "module.", "net.", "net._orig_mod.", "model.module."):
        torch.save({"state_dict": named(prefix, state)}, tmp_path / "a.ckpt")
        model = zoo.create_model("test_vit", "dynamicvit", img_size=64, num_classes=7)
        load_weights(model, tmp_path / "a.ckpt")
        assert all(torch.equal(model.state_dict()[k], v) for k, v in state.items())


def test_a_file_without_classifier(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "ssl.pth"
    torch.save(BODY, path)
    text = weights_refusal(make(), path)
    assert "the file has no classifier, the model test_vit has 7" in text
    load_weights(make(), path, new_head=True)
    with caplog.at_level(logging.WARNING):
        load_weights(make(), path, new_head="auto")
    assert [r.message for r in caplog.records] == [
        f"new classifier: 7 classes, {path} has none"
    ]  # one line
    caplog.clear()
    torch.save(tower(num_classes=3).state_dict(), path)
    with caplog.at_level(logging.WARNING):
        model = load_weights(make(), path, new_head="auto")
    assert [r.message for r in caplog.records] == [f"new classifier: 7 classes, {path} has 3"]
    assert torch.equal(model.unwrap().head.weight, make().unwrap().head.weight)
    # A classifier that fits is taken.
    torch.save(tower(num_classes=7).state_dict(), path)
    model = load_weights(make(), path, new_head="auto")
    assert torch.equal(model.unwrap().head.weight, tower(num_classes=7).head.weight)
    with pytest.raises(ZooError, match="new_head must be"):
        load_weights(make(), path, new_head="maybe")  # type: ignore[arg-type]


def test_an_averaging_model_starts_from_the_norm_of_its_pretraining(tmp_path: Path) -> None:
    """As MAE is fine-tuned: the encoder was trained with a norm behind the class token."""
    path = tmp_path / "mae.pth"
    torch.save({"model": {**BODY, **decoder()}}, path)
    model = make(global_pool="avg", fc_norm=True)
    load_weights(model, path, new_head="auto")
    assert torch.equal(model.unwrap().fc_norm.weight, BODY["norm.weight"])
    # With a classifier it would be another function, in silence.
    torch.save(tower(num_classes=7).state_dict(), path)
    assert "fc_norm.weight" in weights_refusal(make(global_pool="avg", fc_norm=True), path)


def test_names_of_other_releases(tmp_path: Path) -> None:
    """timm's own conversions see the whole file: DeiT III's scales, OpenCLIP's vision tower."""
    torch.manual_seed(3)
    scaled = timm.create_model("test_vit", img_size=64, num_classes=7, init_values=0.1)
    with torch.no_grad():
        scaled.blocks[2].ls1.gamma.fill_(0.3)
    state = {
        k.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): v
        for k, v in scaled.state_dict().items()
    }
    torch.save({"model": state}, tmp_path / "deit3.pth")
    model = load_weights(make(init_values=0.1), tmp_path / "deit3.pth")
    assert torch.equal(model.unwrap().blocks[2].ls1.gamma, scaled.blocks[2].ls1.gamma)

    clip = {
        **named("visual.trunk."),
        "visual.head.proj.weight": torch.full((7, 64), 0.5),
        "logit_scale": torch.tensor(1.0),
    }
    torch.save({"state_dict": named("module.", clip)}, tmp_path / "clip.pth")
    model = load_weights(make(), tmp_path / "clip.pth")
    assert torch.equal(model.unwrap().head.weight, torch.full((7, 64), 0.5))
    assert torch.equal(model.unwrap().cls_token, BODY["cls_token"])


def test_a_folder_with_somebody_else_s_config(tmp_path: Path) -> None:
    """As timm and the hub write folders of weights."""
    from safetensors.torch import save_file

    source = tower(num_classes=7)
    save_file(source.state_dict(), str(tmp_path / "model.safetensors"))
    (tmp_path / "config.json").write_text('{"architecture": "test_vit", "num_classes": 7}')
    model = load_weights(make(), tmp_path)
    assert torch.equal(model.unwrap().cls_token, source.cls_token)
    with pytest.raises(ZooError, match="'backbone' must be a mapping"):
        zoo.load(tmp_path)


@pytest.mark.parametrize("change", ["meta", "sparse", "int8", "quantised"])
def test_tensors_that_torch_would_copy_in_silence(tmp_path: Path, change: str) -> None:
    state = dict(tower(num_classes=7).state_dict())
    weight = state["blocks.1.mlp.fc1.weight"]
    state["blocks.1.mlp.fc1.weight"] = {
        "meta": lambda: weight.to("meta"),
        "sparse": lambda: weight.to_sparse(),
        "int8": lambda: (weight * 100).to(torch.int8),
        "quantised": lambda: torch.quantize_per_tensor(weight, 0.1, 0, torch.qint8),
    }[change]()
    torch.save(state, tmp_path / "odd.pth")
    text = weights_refusal(make(), tmp_path / "odd.pth")
    assert "blocks.1.mlp.fc1.weight" in text


# ---------------------------------------------------------------------------------- Google's files


def npz(model: nn.Module, classes: bool = True) -> dict[str, np.ndarray]:
    """A timm ViT in the layout of Google's files."""
    state = {k: v.detach().numpy() for k, v in model.state_dict().items()}
    width, heads = model.embed_dim, model.blocks[0].attn.num_heads
    found = {
        "embedding/kernel": state["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": state["patch_embed.proj.bias"],
        "cls": state["cls_token"],
        "Transformer/posembed_input/pos_embedding": state["pos_embed"],
        "Transformer/encoder_norm/scale": state["norm.weight"],
        "Transformer/encoder_norm/bias": state["norm.bias"],
    }
    if classes:
        found |= {"head/kernel": state["head.weight"].T, "head/bias": state["head.bias"]}
    for i in range(len(model.blocks)):
        own, to = f"blocks.{i}.", f"Transformer/encoderblock_{i}/"
        for ours, theirs in (("norm1", "LayerNorm_0"), ("norm2", "LayerNorm_2")):
            found[f"{to}{theirs}/scale"] = state[f"{own}{ours}.weight"]
            found[f"{to}{theirs}/bias"] = state[f"{own}{ours}.bias"]
        weights = np.split(state[f"{own}attn.qkv.weight"], 3)
        biases = np.split(state[f"{own}attn.qkv.bias"], 3)
        attn = f"{to}MultiHeadDotProductAttention_1/"
        for name, weight, bias in zip(("query", "key", "value"), weights, biases, strict=True):
            found[f"{attn}{name}/kernel"] = weight.T.reshape(width, heads, -1)
            found[f"{attn}{name}/bias"] = bias.reshape(heads, -1)
        found[f"{attn}out/kernel"] = state[f"{own}attn.proj.weight"].T.reshape(heads, -1, width)
        found[f"{attn}out/bias"] = state[f"{own}attn.proj.bias"]
        for j, layer in enumerate(("fc1", "fc2")):
            found[f"{to}MlpBlock_3/Dense_{j}/kernel"] = state[f"{own}mlp.{layer}.weight"].T
            found[f"{to}MlpBlock_3/Dense_{j}/bias"] = state[f"{own}mlp.{layer}.bias"]
    return found


def test_google_files(tmp_path: Path) -> None:
    path, source = tmp_path / "B_16.npz", tower(num_classes=7)
    np.savez(path, **npz(source))
    for model in (make("tome"), make().unwrap()):
        load_weights(model, path)
        got = (model.unwrap() if hasattr(model, "unwrap") else model).state_dict()
        assert all(torch.allclose(got[k], v) for k, v in source.state_dict().items())
    # Another image size is resampled, as from any other file; other classes are refused.
    big = load_weights(make(img_size=96), path)
    assert not torch.equal(big.unwrap().pos_embed[:, :17], source.pos_embed)
    assert "the file has 7 classes" in weights_refusal(make(num_classes=3), path)
    np.savez(path, **npz(source, classes=False))
    assert "no classifier" in weights_refusal(make(), path)
    load_weights(make(), path, new_head="auto")


def test_google_files_of_another_architecture(tmp_path: Path) -> None:
    path, content = tmp_path / "B_16.npz", npz(tower(num_classes=7))
    np.savez(path, **content)
    assert "the file has 6 blocks, the model 4" in weights_refusal(make(depth=4), path)
    assert "the file has 6 blocks, the model 8" in weights_refusal(make(depth=8), path)
    assert "not the weights" in weights_refusal(make(embed_dim=32), path)
    # timm alone would leave what the file does not hold as it was.
    assert "reg_token" in weights_refusal(make(reg_tokens=2, no_embed_class=True), path)
    assert "patch_embed" in weights_refusal(make(patch_size=8), path)
    lost = {k: v for k, v in content.items() if "encoderblock_5/MlpBlock" not in k}
    np.savez(path, **lost)
    assert "not the weights" in weights_refusal(make(), path)
    np.savez(path, a=np.zeros(3))
    assert "not in the layout" in weights_refusal(make(), path)
    path.write_bytes(path.read_bytes()[:100])
    assert "not a complete .npz" in weights_refusal(make(), path)
    path.write_bytes(b"")
    assert "empty" in weights_refusal(make(), path)
    np.savez(path, **{"embedding/kernel": np.array([print], dtype=object)})
    assert "not a complete .npz" in weights_refusal(make(), path)
