"""Models that begin with more than one convolution: their stem is counted, or they are refused."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import nn

import zoo
from tests.covering import every
from zoo.adapters.hollow import hollow
from zoo.cost.counters import torch_gmacs
from zoo.errors import ZooError

#: Hybrids (ResNet stems of several depths), ViTamin (MBConv stages), and ViTs with one convolution.
ACCEPTED = [
    "vit_tiny_r_s16_p8_224",
    "vit_small_r26_s32_224",
    "vit_base_r50_s16_224",
    "vit_small_resnet26d_224",
    "vitamin_small_224",
    "vitamin_xlarge_256",
    "flexivit_small",
    "vit_small_patch16_224",
]
#: Have stages of several resolutions, or attention of their own.
MIXED = [
    *("coat_tiny", "convit_tiny", "davit_tiny", "efficientformer_l1", "fastvit_t8", "levit_128s"),
    *("maxvit_tiny_tf_224", "mobilevit_s", "nextvit_small", "tiny_vit_5m_224", "visformer_tiny"),
    *("xcit_nano_12_p16_224", "pit_ti_224", "pvt_v2_b0", "swin_tiny_patch4_window7_224"),
    *("cait_xxs24_224", "crossvit_9_240", "gcvit_xxtiny", "hiera_tiny_224", "mvitv2_tiny"),
]


def on_meta(name: str, **args: Any) -> nn.Module:
    with hollow():
        return timm.create_model(name, **args).eval()


def check(dense: nn.Module) -> None:
    """It is counted as torch counts it, dense and reduced, and it runs."""
    cfg: Any = dense.pretrained_cfg
    images = torch.zeros(1, *cfg["input_size"], device="meta")
    assert zoo.profile(dense).gmacs == pytest.approx(torch_gmacs(dense, images), rel=1e-6)
    has_class_token = getattr(dense, "cls_token", None) is not None
    model = zoo.wrap(dense, "topk" if has_class_token else "dct").eval()
    assert model(images).shape == dense(images).shape
    found = zoo.profile(model)
    assert found.gmacs < zoo.profile(dense).gmacs
    assert found.gmacs == pytest.approx(torch_gmacs(model, images), rel=2e-3)


@pytest.mark.parametrize("name", every(ACCEPTED, 4))
def test_what_is_accepted_is_counted_and_runs(name: str) -> None:
    check(on_meta(name))


@pytest.mark.parametrize("name", MIXED)
def test_other_shapes_are_refused_or_right(name: str) -> None:
    dense = on_meta(name)
    try:
        zoo.wrap(dense, "tome")
    except ZooError as error:
        assert "\n" not in str(error)
        assert "is not supported" in str(error) or "takes no reducer" in str(error)
    else:
        check(dense)


@pytest.mark.parametrize("size", [64, 96])
def test_a_small_hybrid_answers_with_numbers(size: int) -> None:
    dense = timm.create_model("vit_tiny_r_s16_p8_224", depth=2, img_size=size, num_classes=3)
    model = zoo.wrap(dense, "tome", {"name": "constant_r", "r": 1}).eval()
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        logits, info = model(images, return_info=True)
        assert logits.shape == (2, 3) and logits.isfinite().all()
        assert torch.equal(zoo.wrap(dense, None).eval()(images), dense.eval()(images))
    assert info.tokens[-1][1] < info.tokens[0][0]
    assert zoo.profile(dense).gmacs == pytest.approx(torch_gmacs(dense, images[:1]), rel=1e-6)
    stem = sum(p.numel() for p in dense.patch_embed.backbone.parameters())
    assert stem and zoo.profile(dense).gmacs > 0
