"""Models without content are built with every timm, and are the models that have some."""

from __future__ import annotations

import pytest
import timm
import torch

from zoo.adapters.hollow import hollow


@pytest.mark.parametrize("name", ["test_vit", "vit_tiny_r_s16_p8_224"])
def test_a_hollow_model_has_the_shapes_of_a_real_one(name: str) -> None:
    with hollow():
        empty = timm.create_model(name)
    real = timm.create_model(name)
    shapes = {k: tuple(v.shape) for k, v in real.state_dict().items()}
    assert {k: tuple(v.shape) for k, v in empty.state_dict().items()} == shapes
    assert all(p.is_meta for p in empty.parameters())


def test_numbers_off_a_tensor_without_any_are_zero() -> None:
    with hollow():
        rates = torch.linspace(0, 0.1, 3)
        assert [x.item() for x in rates] == [0.0] * 3 and rates.tolist() == [0.0] * 3
        assert torch.tensor(2.0, device="cpu").item() == 2.0
    assert torch.zeros(1).device.type == "cpu"
