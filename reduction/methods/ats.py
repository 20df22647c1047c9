"""ATS: sample tokens from the attention of the class token."""

from __future__ import annotations

import torch
from torch import Tensor

from reduction.assignment import Keep, apply
from reduction.base import Card, Reducer
from reduction.checks import count, one_of
from reduction.counts import Dims, Step
from reduction.functional.attention import class_row
from reduction.functional.portable import stable_order
from reduction.mixins.adaptive import Adaptive
from reduction.mixins.attention import AttentionInput, AttentionOutput, OwnAttention
from reduction.registry import register
from reduction.tokens import Signals, Tokens

VARIANTS = ("haurum", "official")


def nearest(cdf: Tensor, points: Tensor) -> Tensor:
    """Positions whose cumulative score is nearest to each sample point.

    Args:
        cdf: Cumulative scores `(B, N)`.
        points: Sample points in (0, 1], `(B, K)` or `(1, K)`.

    Returns:
        Indices `(B, K)`, ascending, with repetitions.
    """
    gap = (points.unsqueeze(2) - cdf.unsqueeze(1)).abs()
    return gap.argmin(-1).sort(-1).values


def unique_sorted(index: Tensor) -> tuple[Tensor, Tensor]:
    """Drop repetitions from ascending rows, `(B, K)` to indices and a mask of the same shape.

    Unique indices come first; what follows is padding, whose mask is False.
    """
    fresh = torch.ones_like(index, dtype=torch.bool)
    fresh[:, 1:] = index[:, 1:] != index[:, :-1]
    order = stable_order((~fresh).to(torch.int8))
    return index.gather(1, order), fresh.gather(1, order)


@register("ats")
class ATS(Adaptive, OwnAttention, Reducer):
    """Keep the tokens at evenly spaced quantiles of the class token's attention.

    Inside the attention: a token's score is the class token's attention times the length of the
    token's value; the normalised scores form a distribution, and the tokens nearest to fixed
    quantiles survive. Repetitions collapse, so an image keeps as many tokens as it needs. Only
    the rows of kept tokens are computed, over all keys.

    The number of kept tokens depends on the image. Batches are padded with masked tokens, a single
    image is not, and the output of an image never depends on the others.

    Args:
        variant: "haurum" accumulates in token order and measures values per head; "official"
            accumulates by ascending score and measures the concatenated value.
        points: Sample points. None takes as many as the schedule keeps; the released official code
            takes as many as there are patches in every block, and works with no other number.

    Raises:
        ZooError: If the variant is unknown or `points` below 1.

    References:
        Fayyaz et al., ECCV 2022, arXiv 2111.15667; official code
        github.com/adaptivetokensampling/ATS (Apache-2.0); the other variant as in
        github.com/JoakimHaurum/TokenReduction (MIT).
    """

    card = Card(
        title="Adaptive Token Sampling for Efficient Vision Transformers",
        authors="Fayyaz et al.",
        venue="ECCV",
        year=2022,
        arxiv="2111.15667",
        code="https://github.com/adaptivetokensampling/ATS",
        licence="Apache-2.0",
        kind="prune",
        training="none (fine-tuning recommended)",
        note="Counts depend on the image; the schedule gives upper limits.",
    )
    site = "attn"

    def __init__(self, variant: str = "haurum", points: int | None = None) -> None:
        super().__init__()
        self.variant = one_of("variant", variant, VARIANTS)
        self.points = count("points", points, null=True)

    @property
    def needs_class_token(self) -> bool:
        return True

    def attend(self, a: AttentionInput, t: Tokens, step: Step | None) -> AttentionOutput | None:
        if step is None:
            return None
        row = class_row(a.q, a.k, a.scale, a.bias, a.class_tokens)[:, :, t.prefix :]
        value = a.v[:, :, t.prefix :]
        index, valid = self._sample(row.detach(), value.detach(), t, step)
        longest = self._longest(valid)
        index, valid = index[:, :longest], valid[:, :longest]
        kept = apply(t, Keep(index, valid))
        prefix = torch.arange(t.prefix, device=index.device).expand(index.shape[0], -1)
        rows = torch.cat([prefix, index + t.prefix], dim=1)
        out, _ = a.of_queries(rows)._replace(need=frozenset()).usual()
        return AttentionOutput(out, Signals(), kept)

    def _longest(self, valid: Tensor) -> int:
        """Rows to keep: those that some image needs. A compiled graph keeps the upper limit."""
        tracing = torch.jit.is_tracing()  # type: ignore[no-untyped-call]
        if valid.device.type == "meta" or torch.compiler.is_compiling() or tracing:
            return valid.shape[1]
        return max(1, int(valid.sum(1).max()))

    def _sample(self, row: Tensor, value: Tensor, t: Tokens, step: Step) -> tuple[Tensor, Tensor]:
        mask = None if t.mask is None else t.mask[:, t.prefix :]
        if self.variant == "haurum":
            score = (row * value.norm(dim=-1)).sum(1)
        else:
            length = value.transpose(1, 2).flatten(2).norm(dim=-1)
            score = row.sum(1) * length
        score = score.float()
        if mask is not None:
            score = score * mask
        if self.variant == "haurum":
            score = score / (score.sum(1, keepdim=True) + 1e-6)
            count = (self.points or step.keep) + 1
            ranks = torch.arange(1, count, device=score.device)
            points = (2 * ranks - 1) / (2 * count)
            cdf = score.cumsum(1)
            if mask is not None:
                # Padding must never be the nearest, whatever its cumulative score.
                cdf = torch.where(mask, cdf, torch.inf)
            return self._cut(*unique_sorted(nearest(cdf, points.unsqueeze(0))), step.keep)
        return self._official(score, mask, step.keep)

    def _official(self, score: Tensor, mask: Tensor | None, keep: int) -> tuple[Tensor, Tensor]:
        score = score / score.sum(1, keepdim=True)
        if mask is not None:
            score = score.masked_fill(~mask, -1.0)  # padding sorts to the front
        value, order = score.sort(dim=1)
        real = value >= 0
        cdf = value.clamp_min(0).cumsum(1)
        # The released code starts at the smallest score while nothing is dropped yet, and at zero
        # afterwards, because it keeps dropped tokens with a score of zero. With removal it did so
        # only for images that happened to be padded, and results depended on the batch.
        low = cdf.amin(1, keepdim=True) if mask is None else 0.0
        cdf = (cdf - low) / (cdf.amax(1, keepdim=True) - low)
        first = torch.where(real & (cdf > 0), cdf, torch.inf).amin(1, keepdim=True)
        points = self.points or keep
        ranks = torch.arange(points, device=score.device)
        y = first + ranks * (1 - first) / max(points - 1, 1)
        cdf = torch.where(real, cdf, torch.inf)
        place, valid = self._cut(*unique_sorted(nearest(cdf, y)), keep)
        return order.gather(1, place), valid

    @staticmethod
    def _cut(index: Tensor, valid: Tensor, keep: int) -> tuple[Tensor, Tensor]:
        """No more than the schedule keeps; only `points` above it can reach the limit."""
        return index[:, :keep], valid[:, :keep]

    def macs(self, n: int, prefix: int, step: Step, dims: Dims) -> int:
        # The rows of what acts as the class token.
        return dims.class_tokens * (n + prefix) * dims.heads * dims.head_dim
