"""Methods that rank tokens: what they rank by, and what becomes of those that are not kept."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from reduction.assignment import Assignment, Keep
from reduction.base import Reducer
from reduction.checks import one_of
from reduction.counts import Step
from reduction.errors import ZooError
from reduction.functional.lots import lots, seed_or_torchs
from reduction.functional.scores import ATTENTION, Draw, score_named
from reduction.mixins.images import SeesImages
from reduction.tokens import OF_THE_MLP, Signals, Tokens

_OWN: Any = object()


class ScoreReducer(SeesImages, Reducer):
    """Keep the tokens with the highest score, and settle what becomes of the others.

    A method that ranks by something of its own writes `score`. One that ranks by attention hands
    its arguments on, and then its users can choose another score by name. What is not dropped
    is settled in `settle`, which is shown the tokens that `order` brings.

    Args:
        score_from: "class" (what the class token pays) or "column_mean" (what a token receives from
            all, for models without a class token). Left out: the method has a score of its own.
        score: Name of another score, see `reduction.functional.scores`; None is `score_from`.
        seed: Of the score "random"; None is torch's own seed when the reducer is made.

    Raises:
        ZooError: If a score is unknown, `score` and `score_from` both ask for one, or there is a
            seed without anything random.
    """

    def __init__(
        self,
        score_from: str = _OWN,
        score: str | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        own = score_from is _OWN
        self.score_from = None if own else one_of("score_from", score_from, ATTENTION)
        if score is not None and self.score_from == "column_mean" != score:
            raise ZooError(f"give either score or score_from, got {score!r} and {score_from!r}")
        if seed is not None and score != "random":
            raise ZooError(f"seed={seed!r} belongs to score='random', got score={score!r}")
        self.score_name = score
        self.seed = seed_or_torchs(seed) if score == "random" else None
        chosen = self.score_from if score is None else score
        self._ranks = None if chosen is None else score_named(chosen)
        if self._ranks is not None:
            self.needs = self._ranks.needs
        if self.needs & OF_THE_MLP and self.site == "mid":
            self.site = "post"  # what the MLP says is not known before

    def arguments(self) -> dict[str, Any]:
        """Constructor arguments; `score` and `seed` only where a score was chosen by name."""
        found = super().arguments()
        if "score" not in found:
            return found
        found["score"] = self.score_name
        ours = ("score_from", "score", "seed")
        return {k: v for k, v in found.items() if v is not None or k not in ours}

    def see(self, images: Tensor, t: Tokens) -> Tokens:
        """Note what a random score follows from."""
        if self.score_name != "random" or self.training:
            return t
        return t._replace(memory={**t.memory, "lot": lots(images)})

    def score(self, t: Tokens, s: Signals, step: Step) -> Tensor:
        """Scores `(B, N)`, higher is kept."""
        return self.score_in(t, s, step.block)

    def score_in(self, t: Tokens, s: Signals, block: int) -> Tensor:
        """The score that was chosen by name or by `score_from`, in a block.

        Raises:
            NotImplementedError: If none was, and the subclass has not written `score`.
        """
        if self._ranks is None:
            raise NotImplementedError(f"{type(self).__name__} must override score")
        return self._ranks.function(t, s, Draw(self.seed or 0, block, self.training))

    def order(self, t: Tokens, score: Tensor, step: Step) -> Tensor:
        """What `settle` is shown of the tokens, `(B, R)`: the kept ones, then others as it needs.

        Args:
            t: Tokens with N reducible tokens.
            score: `(B, N)`, without gradient.
            step: Budget and position.
        """
        return score.topk(step.keep, dim=1, sorted=False).indices

    def settle(
        self, t: Tokens, kept: Tensor, rest: Tensor, score: Tensor, step: Step
    ) -> Assignment:
        """Decide what becomes of the tokens that are not kept: nothing, they are dropped.

        Args:
            t: Tokens with N reducible tokens.
            kept: The first `step.keep` of `order`, `(B, M)`.
            rest: The others of `order`.
            score: `(B, N)`.
            step: Budget and position.
        """
        return Keep(kept)

    def assign(self, t: Tokens, s: Signals, step: Step) -> Assignment:
        """Rank, and settle."""
        score = self.score(t, s, step)
        order = self.order(t, score.detach(), step)
        return self.settle(t, order[:, : step.keep], order[:, step.keep :], score, step)
