"""eTPS: keep attentive tokens, and squeeze the others into them."""

from __future__ import annotations

from torch import Tensor

from reduction.assignment import Merge
from reduction.base import Card
from reduction.checks import positive
from reduction.counts import Dims, Step
from reduction.functional.squeezing import squeeze
from reduction.mixins.pairing import RankedPairs
from reduction.registry import register
from reduction.tokens import Tokens


@register("etps")
class ETPS(RankedPairs):
    """Keep the patches that the class token attends to most; each absorbs those most like it.

    A dropped token joins the kept one with the highest cosine c. A kept token becomes
    `(e x_j + sum exp(c_i) x_i) / (e + sum exp(c_i))` over the tokens that joined it, and stays as
    it is where none did. Nothing is learned, and attention knows no sizes.

    The count rule of the paper's EViT variant is `schedule=keep_rate of=current rounding=ceil`.

    Args:
        score_from: "class" (the paper's) or "column_mean" (attention received from all tokens;
            ours, for models without a class token).
        temperature: Divides the cosines.
        score: Rank by another score, see `ranked`; None is `score_from`.
        seed: Of the score "random", see `random`.

    Raises:
        ZooError: If `temperature` is not positive.

    References:
        Wei et al., CVPR 2023, arXiv 2304.10716; official code
        github.com/megvii-research/TPS-CVPR2023 (Apache-2.0).
    """

    card = Card(
        title="Joint Token Pruning and Squeezing Towards More Aggressive Compression of Vision "
        "Transformers",
        authors="Wei et al.",
        venue="CVPR",
        year=2023,
        arxiv="2304.10716",
        code="https://github.com/megvii-research/TPS-CVPR2023",
        licence="Apache-2.0",
        kind="prune + squeeze",
        training="none (fine-tuning recommended)",
        note="Only the squeezing step of this variant was released; the rest follows EViT's rule.",
    )
    site = "mid"

    def __init__(
        self,
        score_from: str = "class",
        temperature: float = 1.0,
        score: str | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(score_from, score, seed)
        self.temperature = self.squeezing = positive("temperature", temperature)

    def order(self, t: Tokens, score: Tensor, step: Step) -> Tensor:
        return score.argsort(dim=1, descending=True)

    def settle(self, t: Tokens, kept: Tensor, rest: Tensor, score: Tensor, step: Step) -> Merge:
        return squeeze(t, kept, rest, self.temperature)

    def macs(self, n: int, prefix: int, step: Step, dims: Dims) -> int:
        # The cosines of dropped with kept tokens.
        return (n - step.keep) * step.keep * dims.width
