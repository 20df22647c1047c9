"""The weights that ship with the package."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch

import zoo
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
