"""Methods that rank tokens: what they rank by, and what becomes of the others."""

from __future__ import annotations

from torch import Tensor

from reduction.assignment import Assignment, Keep
from reduction.base import Reducer
from reduction.counts import Step
from reduction.errors import ZooError
from reduction.tokens import Signals, Tokens

SCORES = ("class", "column_mean")


def attention_score(s: Signals, score_from: str, prefix: int) -> Tensor:
    """Importance from attention, `(B, N)`.

    Args:
        s: Signals with `cls_row` or `column`.
        score_from: "class": what the class token pays, averaged over heads. "column_mean": what a
            token receives, averaged over heads and queries.
        prefix: Number of prefix tokens, which get no score.
    """
    if score_from == "class":
        assert s.cls_row is not None
        return s.cls_row.mean(1)[:, prefix:]
    assert s.column is not None
    return s.column[:, prefix:]


def score_signal(score_from: str) -> frozenset[str]:
    """The signal that `attention_score` reads.

    Raises:
        ZooError: If `score_from` is neither "class" nor "column_mean".
    """
    if score_from not in SCORES:
        raise ZooError(f"score_from must be one of {SCORES}, got {score_from!r}")
    return frozenset({"cls_row" if score_from == "class" else "column"})


class ScoreReducer(Reducer):
    """Keep the tokens with the highest score. A subclass writes `score`."""

    def score(self, t: Tokens, s: Signals, step: Step) -> Tensor:
        """Scores `(B, N)`, higher is kept."""
        raise NotImplementedError(f"{type(self).__name__} must override score")

    def assign(self, t: Tokens, s: Signals, step: Step) -> Assignment:
        """Keep the `step.keep` best tokens, in no particular order."""
        score = self.score(t, s, step)
        return Keep(score.topk(step.keep, dim=1, sorted=False).indices)
