"""DCT: the closed form of the matrix against the transform itself."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import reduction
from reduction.methods.dct import low_pass
from reduction.tokens import Tokens


def dct_by_fft(x: Tensor) -> Tensor:
    """Orthonormal DCT-II over the first dimension, from the FFT of the mirrored signal."""
    n = x.shape[0]
    spectrum = torch.fft.fft(torch.cat([x, x.flip(0)]), dim=0)[:n]
    k = torch.arange(n, dtype=torch.float64)
    turned = (spectrum * torch.exp(-0.5j * math.pi * k / n).unsqueeze(1)).real / 2
    scale = torch.full((n, 1), math.sqrt(2 / n), dtype=torch.float64)
    scale[0] = math.sqrt(1 / n)
    return turned * scale


@pytest.mark.parametrize(("n", "m"), [(7, 7), (2, 1), (9, 3), (64, 57), (196, 183), (50, 25)])
def test_the_matrix_is_the_transform(n: int, m: int) -> None:
    x = torch.randn(n, 5, dtype=torch.float64)
    y = low_pass(n, m) @ x
    # Compared by spectrum: the kept frequencies are those of the input, and there are no others.
    assert torch.allclose(dct_by_fft(y), dct_by_fft(x)[:m], atol=1e-10)


def test_nothing_dropped_is_the_identity() -> None:
    assert torch.allclose(low_pass(30, 30), torch.eye(30, dtype=torch.float64), atol=1e-12)


def test_energy_never_grows_but_constants_do() -> None:
    for n, m in ((64, 57), (10, 5), (3, 2)):
        w = low_pass(n, m)
        assert torch.allclose(w @ w.T, torch.eye(m, dtype=torch.float64), atol=1e-10)
        constant = w @ torch.ones(n, dtype=torch.float64)
        expected = torch.full((m,), math.sqrt(n / m), dtype=torch.float64)
        assert torch.allclose(constant, expected, atol=1e-10)


def test_rows_keep_their_places() -> None:
    t = Tokens.start(torch.randn(2, 17, 4), 1, track=True)
    step = reduction.Step(0, 4, reduction.Budget(8), (4, 4))
    out = reduction.create("dct").reduce(t, reduction.Signals(), step)
    assert torch.equal(out.x[:, 0], t.x[:, 0])
    assert out.origin.tolist() == [[1, 3, 5, 7, 9, 11, 13, 15]] * 2
    assert out.source.tolist() == [[i // 2 for i in range(16)]] * 2
    assert torch.allclose(out.size.sum(1), torch.tensor(17.0))
