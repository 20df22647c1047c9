"""What is held against an exported model, and what is rounding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from zoo.export.agreement import compare

IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Choice(torch.nn.Module):
    """Answers with the first or the second class by the sign of a sum, which may be about zero."""

    def forward(self, x: Tensor) -> Tensor:
        first = (x.flatten(1).sum(1) > 0).float()
        return torch.stack([first, 1 - first], 1)


def balanced() -> Tensor:
    """Images of which the second has a sum of zero but for rounding."""
    images = IMAGES.clone()
    images[1] -= images[1].mean()
    return images


def outcome(images: Tensor, wrong: list[int], far: float = 1.0, tolerance: float | None = 1e-4):
    model = Choice()
    wanted = model(images)
    found = wanted.numpy().copy()
    for i in wrong:
        found[i] = wanted[i].flip(0).numpy() + (far - 1)
    pairs = [(images[:1], wanted[:1], found[:1]), (images[1:], wanted[1:], found[1:])]
    return compare(model, pairs, tolerance)


def test_the_same_answers_agree() -> None:
    found = outcome(balanced(), [])
    assert found.agrees and found.error == 0 and found.undecided == 0


def test_a_tie_is_not_held_against_a_graph() -> None:
    found = outcome(balanced(), [1])
    assert found.agrees and found.error == 1 and found.undecided == 1


@pytest.mark.parametrize("wrong", [[0], [1, 2], [0, 1, 2, 3]])
def test_an_image_that_torch_is_sure_of_is(wrong: list[int]) -> None:
    assert not outcome(balanced(), wrong).agrees


def test_a_tie_does_not_excuse_any_answer() -> None:
    assert outcome(balanced(), [1], far=3).agrees
    assert not outcome(balanced(), [1], far=9).agrees


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("image", [0, 1, 3])
@pytest.mark.parametrize("tolerance", [1e-4, None])
def test_no_number_never_agrees(value: float, image: int, tolerance: float | None) -> None:
    """In the first batch or a later one, on a tie or not."""
    assert not outcome(balanced(), [image], far=value, tolerance=tolerance).agrees


def test_another_precision_is_only_measured() -> None:
    found = outcome(balanced(), [0, 2], tolerance=None)
    assert found.agrees and found.error == 1 and found.undecided == 0
