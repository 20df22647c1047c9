"""Ranked: any score, and any way of settling what becomes of the others. Ours."""

from __future__ import annotations

from torch import Tensor

from reduction.assignment import Assignment, Keep
from reduction.base import Card
from reduction.checks import boolean, one_of, positive
from reduction.counts import Dims, Step
from reduction.errors import ZooError
from reduction.functional.scores import SCORES
from reduction.functional.settling import fuse, join_nearest
from reduction.functional.squeezing import squeeze
from reduction.mixins.pairing import RankedPairs
from reduction.registry import register
from reduction.tokens import Tokens

SETTLES = ("drop", "fuse", "squeeze", "nearest")


@register("ranked")
class Ranked(RankedPairs):
    """Keep the tokens with the highest score; one option says which score, one what else happens.

    Between attention and MLP. Scores are not negative and add up to at most one over the tokens of
    an image, so each can also weigh what is fused. With the score "class" this is Top-K (drop),
    EViT (fuse) or eTPS (squeeze); the other pairs ask what of a method is its score.

    Args:
        score: "class" (what the class token pays), "column" (what a token receives from all),
            "norm" (length of the features), "random", "inverse" (what the class token pays least
            comes first) or "repshift" (see that method; acts behind the MLP).
        settle: What becomes of the tokens that are not kept. "drop": they are gone; "fuse": they
            become one more token, their sum weighted by scores; "squeeze": each joins the kept one
            most like it, weighted by `exp(cosine)`; "nearest": so too, in a size-weighted mean.
        temperature: Of "squeeze": divides the cosines; None is 1.
        prop_attn: Proportional attention: later attentions see log(size).
        seed: Of the score "random"; None is torch's own seed when the reducer is made.

    Raises:
        ZooError: If an argument is unknown, out of range, or has nothing to act on.

    References:
        Ours. Scores and ways of settling are those of the methods named above.
    """

    card = Card(
        title="Ranked (ours): any score with any way of settling",
        authors="TokenZoo",
        venue="ours",
        year=2026,
        arxiv=None,
        code=None,
        licence=None,
        kind="prune, fuse or merge",
        training="none (fine-tuning recommended)",
        note="Ours, to compare scores and ways of settling one by one; not a published method.",
    )
    site = "mid"
    only = (("settle", ("nearest", "squeeze")),)

    def __init__(
        self,
        score: str = "class",
        settle: str = "drop",
        temperature: float | None = None,
        prop_attn: bool = False,
        seed: int | None = None,
    ) -> None:
        super().__init__(score=one_of("score", score, SCORES), seed=seed)
        self._settle = one_of("settle", settle, SETTLES)
        self.temperature = positive("temperature", temperature, null=True)
        self.squeezing = (temperature or 1.0) if settle == "squeeze" else None
        self.prop_attn = boolean("prop_attn", prop_attn)
        if temperature is not None and settle != "squeeze":
            raise ZooError(
                f"temperature={temperature!r} belongs to settle='squeeze', got settle={settle!r}"
            )

    def arguments(self) -> dict[str, object]:
        """Constructor arguments; `settle` is also the name of a method."""
        return {**super().arguments(), "settle": self._settle}

    def count(self, n: int, step: Step) -> int:
        return n if step.keep >= n else step.keep + (self._settle == "fuse")

    def order(self, t: Tokens, score: Tensor, step: Step) -> Tensor:
        if self._settle == "drop":
            return super().order(t, score, step)
        if self._settle == "fuse":
            return score.topk(step.keep + 1, dim=1).indices
        return score.argsort(dim=1, descending=True)

    def settle(
        self, t: Tokens, kept: Tensor, rest: Tensor, score: Tensor, step: Step
    ) -> Assignment:
        if self._settle == "drop":
            return Keep(kept)
        if self._settle == "fuse":
            return fuse(kept, rest, score)
        if self._settle == "squeeze":
            return squeeze(t, kept, rest, 1.0 if self.temperature is None else self.temperature)
        return join_nearest(t, kept, rest)

    def macs(self, n: int, prefix: int, step: Step, dims: Dims) -> int:
        if self._settle == "fuse":
            return n * dims.width
        pairs = self._settle in ("squeeze", "nearest")
        return (n - step.keep) * step.keep * dims.width if pairs else 0
