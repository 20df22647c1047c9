"""Representation shift: keep the tokens that a block changes most."""

from __future__ import annotations

from torch import Tensor

from reduction.base import Card
from reduction.checks import boolean, one_of
from reduction.counts import Step
from reduction.errors import ZooError
from reduction.functional.portable import stable_order
from reduction.functional.scores import distance
from reduction.mixins.ranking import ScoreReducer
from reduction.registry import register
from reduction.tokens import Signals, Tokens

OPS = ("mlp", "attention", "block")
DISTANCES = ("l2", "l1", "cosine")
#: What each part of a block puts out, and what it was put out from.
_SIGNALS = {"mlp": ("x_mid", "mlp"), "attention": ("x_in", "x_mid"), "block": ("x_in",)}


@register("repshift")
class RepShift(ScoreReducer):
    """Behind the block, keep the tokens whose representation a part of it shifts most.

    With `x'` the residual stream behind the attention and `f` the answer of the MLP to it, tokens
    are ranked by `|f - x'|`. No attention is looked at, so fused kernels stay and no class token is
    needed. All rows of the block are computed before the cut.

    Args:
        op: What shifts: "mlp", "attention" (its answer and the block's input) or "block" (the
            block's output and input).
        distance: "l2", "l1" or "cosine" (one minus it).
        residual: Rank by the length of what is added alone, the other reading of "shift". Not for
            "block", where that is what is ranked by already, nor with the cosine.

    Raises:
        ZooError: If an argument is unknown, or `residual` has no meaning.

    References:
        Choi et al., ICCV 2025, arXiv 2508.00367. Written from the paper; the code was not at hand.
    """

    card = Card(
        title="Representation Shift: Unifying Token Compression with FlashAttention",
        authors="Choi et al.",
        venue="ICCV",
        year=2025,
        arxiv="2508.00367",
        code=None,
        licence=None,
        kind="prune",
        training="none",
        note="One reading of the paper's equation; its code was not at hand to compare with.",
    )
    site = "post"
    drops = True

    def __init__(self, op: str = "mlp", distance: str = "l2", residual: bool = False) -> None:
        super().__init__()
        self.op = one_of("op", op, OPS)
        self.distance = one_of("distance", distance, DISTANCES)
        self.residual = boolean("residual", residual)
        if residual and (op == "block" or distance == "cosine"):
            raise ZooError(
                "residual=true is the length of what the MLP or the attention adds; got "
                f"op={op!r} and distance={distance!r}"
            )
        self.needs = frozenset(_SIGNALS[op])

    def score(self, t: Tokens, s: Signals, step: Step) -> Tensor:
        return self.shift(t, s)[:, t.prefix :]

    def shift(self, t: Tokens, s: Signals) -> Tensor:
        """How far every token moved, prefix included, `(B, P+N)`."""
        if self.op == "block":
            return distance(t.x, s.need("x_in"), self.distance)
        before = s.need("x_mid" if self.op == "mlp" else "x_in")
        added = s.need("mlp") if self.op == "mlp" else s.need("x_mid") - before
        start = added.new_zeros(()) if self.residual else before
        return distance(added, start, self.distance)

    def order(self, t: Tokens, score: Tensor, step: Step) -> Tensor:
        return stable_order(score, descending=True)[:, : step.keep].sort(dim=1).values
