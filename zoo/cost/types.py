"""What counting costs finds: see `zoo.cost.analytic` for the convention and the counting."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from reduction.counts import BlockCost


class Gmacs(NamedTuple):
    """Cost of one image in 1e9 multiply-accumulates, by part."""

    linear: float
    attention: float
    reducer: float

    @property
    def total(self) -> float:
        """All parts together."""
        return self.linear + self.attention + self.reducer


class Sample(NamedTuple):
    """Cost of a model whose cost depends on the image, in GMACs, over a number of images.

    Attributes:
        mean: Mean over the images.
        min: The cheapest image.
        max: The most expensive one.
        images: How many there were.
        limit: The most that the schedule allows.
    """

    mean: float
    min: float
    max: float
    images: int
    limit: float


@dataclass(frozen=True)
class Profile:
    """Cost of a model for one image.

    Attributes:
        gmacs: Total in 1e9 multiply-accumulates.
        params: Number of parameters.
        tokens: `(entering, leaving)` per block, prefix tokens included.
        linear: GMACs of convolutions and linear layers.
        attention: GMACs of the attention products.
        reducer: GMACs of the reducer's own products.
        dense: GMACs of the same backbone with nothing reduced; None where there is no such thing.
        blocks: Cost per block.
        convention: "zoo", or "diffrate" for that paper's own count.
        macs: Total as an exact integer.
        sample: Spread of a cost that was measured on images, or counted for images of several
            sizes; everything else is then the mean over them (tokens rounded). None where the cost
            is the same for all images, and where it is the upper limit because none were given.
    """

    gmacs: float
    params: int
    tokens: list[tuple[int, int]]
    linear: float
    attention: float
    reducer: float
    dense: float | None
    blocks: list[BlockCost]
    convention: str
    macs: int
    sample: Sample | None = None

    def __str__(self) -> str:
        dense = self.dense
        saved = f" ({self.gmacs / dense - 1:+.1%} of {dense:.4f} dense)" if dense else ""
        head = f"{self.gmacs:.4f} GMACs{saved}, {self.params / 1e6:.2f} M parameters"
        parts = (
            f"linear {self.linear:.4f}, attention {self.attention:.4f}, reducer {self.reducer:.4f}"
        )
        if (s := self.sample) is not None:
            parts += (
                f"\nmean of {s.images} images, {s.min:.4f} to {s.max:.4f} GMACs; "
                f"upper limit {s.limit:.4f}"
            )
        rows = [f"{'block':>5} {'in':>6} {'mlp':>6} {'out':>6} {'GMACs':>8} {'reducer':>8}"]
        for i, b in enumerate(self.blocks):
            total = (b.linear + b.attention + b.mlp + b.reducer) / 1e9
            rows.append(
                f"{i:>5} {b.tokens_in:>6} {b.tokens_mid:>6} {b.tokens_out:>6} "
                f"{total:>8.4f} {b.reducer / 1e9:>8.5f}"
            )
        return "\n".join([head, parts, *rows])


def mean_of(found: Sequence[tuple[Profile, int]]) -> Profile:
    """The mean over images of several sizes, with the spread in `sample`.

    Args:
        found: Cost and number of images for each size; of one size the cost is returned as it is.
    """
    if len(found) == 1:
        return found[0][0]
    each, images = [p for p, _ in found], sum(n for _, n in found)

    def mean(values: Iterable[float]) -> float:
        return sum(value * n for value, (_, n) in zip(values, found, strict=True)) / images

    spread = [p.sample or Sample(p.gmacs, p.gmacs, p.gmacs, n, p.gmacs) for p, n in found]
    gmacs = mean(p.gmacs for p in each)
    dense = [p.dense for p in each if p.dense is not None]
    rows = zip(*(p.tokens for p in each), strict=True)
    blocks = zip(*(p.blocks for p in each), strict=True)
    return replace(
        each[0],
        gmacs=gmacs,
        macs=round(mean(p.macs for p in each)),
        linear=mean(p.linear for p in each),
        attention=mean(p.attention for p in each),
        reducer=mean(p.reducer for p in each),
        dense=mean(dense) if dense else None,
        tokens=[(round(mean(n for n, _ in row)), round(mean(n for _, n in row))) for row in rows],
        blocks=[BlockCost(*(round(mean(n)) for n in zip(*b, strict=True))) for b in blocks],
        sample=Sample(
            mean=gmacs,
            min=min(s.min for s in spread),
            max=max(s.max for s in spread),
            images=images,
            limit=max(s.limit for s in spread),
        ),
    )
