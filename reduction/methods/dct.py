"""DCT: a low-pass filter along the sequence, without looking at the content."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from reduction.assignment import Mix
from reduction.base import Card, Reducer
from reduction.counts import Dims, Step
from reduction.registry import register
from reduction.tokens import Signals, Tokens


def low_pass(n: int, m: int, device: torch.device | None = None) -> Tensor:
    """Matrix of "orthonormal DCT of length n, drop n - m frequencies, inverse of length m".

    Entry `(i, j)` is a sum of products of two cosines over the kept frequencies. Both cosines of
    their sum and difference add up in closed form (Dirichlet's kernel), so no product of matrices
    is needed:

        W[i, j] = (D(a_i - b_j) + D(a_i + b_j)) / sqrt(n m)
        D(x) = 1/2 + cos(x) + ... + cos((m - 1) x) = sin((m - 1/2) x) / (2 sin(x / 2))

    with `a_i = pi (2i + 1) / 2m` and `b_j = pi (2j + 1) / 2n`.

    Args:
        n: Length before.
        m: Length afterwards, at most n.
        device: Where the matrix is wanted.

    Returns:
        `(m, n)` in float64, or float32 on devices without.
    """
    wide = device is None or device.type != "mps"
    dtype = torch.float64 if wide else torch.float32
    # In units of pi / 2mn, where equal angles are equal integers.
    a = (2 * torch.arange(m, device=device) + 1) * n
    b = (2 * torch.arange(n, device=device) + 1) * m

    def kernel(x: Tensor) -> Tensor:
        # Exact in integers: the sine of (m - 1/2) x has period 4 pi.
        period = 8 * m * n
        top = ((2 * m - 1) * x).remainder(period).to(dtype) * (math.pi / (4 * m * n))
        bottom = 2 * torch.sin(x.to(dtype) * (math.pi / (4 * m * n)))
        flat = x == 0
        ratio = torch.sin(top) / torch.where(flat, 1.0, bottom)
        return torch.where(flat, m - 0.5, ratio)

    near, far = a.unsqueeze(1) - b, a.unsqueeze(1) + b
    return (kernel(near) + kernel(far)) / math.sqrt(n * m)


@register("dct")
class DCT(Reducer):
    """Keep the low frequencies of the token sequence.

    At the output of each block, the rows of the patches are taken as a signal along the raster
    order: orthonormal DCT-II, drop the `r` highest frequencies, orthonormal inverse DCT of the
    shorter length. That is one fixed matrix, the same for all images. A control: what can be had
    without looking at the content.

    A constant signal grows by `sqrt(n / (n - r))` in every step; the port does not correct that.

    References:
        He et al., "Fourier Transformer", Findings of ACL 2023, arXiv 2305.15099, for text. For
        images only a port exists, github.com/Westlake-AI/OpenToMe, which was executed (this
        implementation is written from a specification, not from its code).
    """

    card = Card(
        title="Fourier Transformer: Fast Long Range Modeling by Removing Sequence Redundancy with "
        "FFT Operator",
        authors="He et al.",
        venue="Findings of ACL",
        year=2023,
        arxiv="2305.15099",
        code="https://github.com/LUMIA-Group/FourierTransformer",
        licence="not checked",
        kind="low-pass filter",
        training="none",
        note="Made for text; checked against a public port to images, not against official code.",
    )
    site = "post"
    family = "constant_r"

    def max_drop(self, n: int) -> int:
        return n // 2

    def assign(self, t: Tokens, s: Signals, step: Step) -> Mix:
        n, m = t.n, step.keep
        # The position of a new row is that of the old one at the same share of the sequence.
        place = ((2 * torch.arange(m, device=t.x.device) + 1) * n) // (2 * m)
        leader = place.expand(t.x.shape[0], -1)
        return Mix(low_pass(n, m, t.x.device).to(t.x.dtype), leader=leader)

    def macs(self, n: int, prefix: int, step: Step, dims: Dims) -> int:
        return n * step.keep * dims.width
