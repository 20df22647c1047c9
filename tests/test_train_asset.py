"""The weights that ship with the package."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch

import zoo
from zoo.data.fashion_mnist import DEBIAN
from zoo.data.module import ImageData

ASSET = Path(zoo.__file__).parent / "assets" / "vit_digits"


@pytest.fixture(scope="module")
def shipped():
    model = zoo.load("vit_digits")
    data = ImageData("digits", test_split="test", eval_batch_size=360).attach(model)
    [(images, labels)] = list(data.test_dataloader())
    return model, images, labels


@torch.no_grad()
def test_shipped_weights_know_at_least_97_percent_of_the_test_digits(shipped):
    model, images, labels = shipped
    assert len(labels) == 360
    hits = (model(images).argmax(1) == labels).sum().item()
    assert hits / 360 >= 0.97


@torch.no_grad()
def test_timm_loads_them_by_name(shipped):
    model, images, _ = shipped
    plain = timm.create_model("vit_digits", pretrained=True).eval()
    torch.testing.assert_close(plain(images[:8]), model(images[:8]), rtol=0, atol=0)


def test_they_are_small_and_say_what_they_are():
    assert (ASSET / "model.safetensors").stat().st_size < 2_500_000
    card = (ASSET / "README.md").read_text(encoding="utf-8")
    assert "python train.py experiment=vit_digits" in card


FASHION = ("vit_fashion", "vit_fashion_small")


@pytest.mark.parametrize("name", FASHION)
@torch.no_grad()
def test_the_models_for_clothes_are_timm_s_in_half_precision(name):
    model, plain = zoo.load(name), timm.create_model(name, pretrained=True).eval()
    assert next(model.parameters()).dtype == torch.float32
    images = torch.rand(2, 1, 28, 28)
    torch.testing.assert_close(plain(images), model(images), rtol=0, atol=0)
    assert model.token_counts()[0][0] == 197 and model.depth == 12  # as DeiT has them
    folder = ASSET.with_name(name)
    assert (folder / "model.safetensors").stat().st_size < 4_000_000
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "experiment=vit_fashion_coarse" in card and "experiment=vit_fashion " in card


def test_the_small_one_costs_half():
    large, small = (zoo.profile(zoo.load(name)).gmacs for name in FASHION)
    assert 0.45 < small / large < 0.55


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="needs Debian's package dataset-fashion-mnist")
@pytest.mark.parametrize("name", [FASHION[0], pytest.param(FASHION[1], marks=pytest.mark.slow)])
@torch.no_grad()
def test_they_know_clothes(name):
    model = zoo.load(name)
    data = ImageData("fashion_mnist", test_split="test", eval_batch_size=200).attach(model)
    images, labels = next(iter(data.test_dataloader()))
    assert (model(images).argmax(1) == labels).float().mean() > 0.86
