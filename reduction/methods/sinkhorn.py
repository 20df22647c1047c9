"""Sinkhorn: a balanced soft assignment of tokens to learned centres."""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reduction.assignment import Mix
from reduction.base import Card, Reducer
from reduction.checks import count, positive
from reduction.counts import Dims, Spec, Step
from reduction.mixins.learned import Queries
from reduction.registry import register
from reduction.tokens import Signals, Tokens


def transport_plan(similarity: Tensor, eps: float, iterations: int) -> Tensor:
    """Log-domain Sinkhorn scaling.

    Args:
        similarity: `(B, M, N)`.
        eps: Temperature.
        iterations: Number of row and column updates.

    Returns:
        Plan `(B, M, N)` whose columns sum to one and whose rows tend to `N / M`.
    """
    m, n = similarity.shape[-2:]
    z = similarity.float() / eps
    c = -math.log(m + n)
    g = torch.zeros_like(z[..., :1, :])
    f = torch.zeros_like(z[..., :, :1])
    for _ in range(iterations):
        f = c - (z + g).logsumexp(-1, keepdim=True)
        g = c - (z + f).logsumexp(-2, keepdim=True)
    return (z + f + g - c).exp()


class Centres(nn.Module):
    """Learned centres `(M, C)` of one stage."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.outputs = outputs
        self.v = nn.Parameter(torch.randn(outputs, width))

    def forward(self) -> Tensor:
        """Centres of length one; the gradient passes as if they were stored that way."""
        unit = F.normalize(self.v, dim=-1)
        # The official code normalises the parameter in place, so its gradient skips the norm.
        return self.v + (unit - self.v).detach()


@register("sinkhorn")
class Sinkhorn(Queries, Reducer):
    """Distribute every token over learned centres so that all centres get an equal share.

    Before the block: cosine similarities to the centres, a few Sinkhorn iterations, and each
    output token is the sum of the length-normalised tokens under the plan. The centres are
    learned: train before use.

    Args:
        eps: Temperature. 1.0 in Haurum et al.; 0.25 in the multi-scale hybrid code it comes from.
        iterations: Sinkhorn iterations; 3 and 5 there.

    Raises:
        ZooError: If a value is not positive.

    References:
        Haurum et al., "Multi-scale hybrid vision transformer and Sinkhorn tokenizer for sewer
        defect classification", Automation in Construction 2022; formulas as in
        github.com/JoakimHaurum/TokenReduction (MIT).
    """

    card = Card(
        title="Multi-scale hybrid vision transformer and Sinkhorn tokenizer for sewer defect "
        "classification",
        authors="Haurum et al.",
        venue="Automation in Construction",
        year=2022,
        arxiv=None,
        code="https://github.com/JoakimHaurum/MSHViT",
        licence="MIT",
        kind="soft pooling",
        training="centres, with the backbone",
        note="The centres are learned: train before use.",
    )
    site = "pre"

    def __init__(self, eps: float = 1.0, iterations: int = 3) -> None:
        super().__init__()
        self.eps = positive("eps", eps)
        self.iterations = count("iterations", iterations)

    def build(self, spec: Spec, step: Step) -> nn.Module:
        return Centres(spec.width, step.keep)

    def assign(self, t: Tokens, s: Signals, step: Step) -> Mix:
        centres = cast(Centres, self.stage(step))()
        values = F.normalize(t.patches, dim=-1, eps=1e-12)
        similarity = (values @ centres.to(values.dtype).T).transpose(1, 2)
        return Mix(transport_plan(similarity, self.eps, self.iterations), values)

    def macs(self, n: int, prefix: int, step: Step, dims: Dims) -> int:
        return 2 * self.count(n, step) * n * dims.width
