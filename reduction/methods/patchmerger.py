"""PatchMerger: learned queries pool the tokens."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from reduction.assignment import Mix
from reduction.base import Card, Reducer
from reduction.checks import one_of
from reduction.counts import Dims, Spec, Step
from reduction.mixins.learned import Queries
from reduction.registry import register
from reduction.tokens import Signals, Tokens

SCALES = ("one", "sqrt")


class Merger(nn.Module):
    """Queries `(M, C)` and the layer norm of one stage."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.outputs = outputs
        self.queries = nn.Parameter(torch.randn(outputs, width))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, prefix: int, scale: float) -> tuple[Tensor, Tensor]:
        """Weights `(B, M, N)` and normalised tokens `(B, N, C)` of `(B, P+N, C)`."""
        # Normalising the prefix too is cheaper than copying the others out first.
        z = self.norm(x)[:, prefix:]
        queries = self.queries.to(z.dtype).expand(z.shape[0], -1, -1)
        logits = torch.bmm(queries, z.transpose(1, 2))
        return (logits if scale == 1 else logits * scale).softmax(-1), z


@register("patchmerger")
class PatchMerger(Queries, Reducer):
    """Each output token is an attention-weighted mean of the layer-normalised tokens.

    `y = softmax(scale * queries @ LN(x)^T) @ LN(x)`, before the block. The output lives in the
    space of the layer norm, without residual. The queries are learned: train before use.

    Args:
        scale: "one" (Haurum et al.'s code; nearly one-hot at the start) or "sqrt" (`C ** -0.5`, a
            common third-party implementation).

    Raises:
        ZooError: If `scale` is unknown.

    References:
        Renggli et al., "Learning to Merge Tokens in Vision Transformers", arXiv 2202.12015; no
        official code. Formulas as in github.com/JoakimHaurum/TokenReduction (MIT).
    """

    card = Card(
        title="Learning to Merge Tokens in Vision Transformers",
        authors="Renggli et al.",
        venue="arXiv",
        year=2022,
        arxiv="2202.12015",
        code=None,
        licence=None,
        kind="soft pooling",
        training="queries, with the backbone",
        note="The queries are learned: train before use.",
    )
    site = "pre"

    def __init__(self, scale: str = "one") -> None:
        super().__init__()
        self.scale = one_of("scale", scale, SCALES)

    def build(self, spec: Spec, step: Step) -> nn.Module:
        return Merger(spec.width, step.keep)

    def assign(self, t: Tokens, s: Signals, step: Step) -> Mix:
        scale = 1.0 if self.scale == "one" else t.x.shape[-1] ** -0.5
        weights, values = cast(Merger, self.stage(step))(t.x, t.prefix, scale)
        return Mix(weights, values)

    def macs(self, n: int, prefix: int, step: Step, dims: Dims) -> int:
        return 2 * self.count(n, step) * n * dims.width
