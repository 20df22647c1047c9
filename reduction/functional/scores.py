"""What tokens can be ranked by, under one name each.

Every score is `(B, N)`, higher for what matters more, not negative, and adds up to at most one over
the tokens of an image. So each can serve as weights as well.

Shapes as in `reduction.tokens`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from reduction.checks import one_of
from reduction.functional.lots import lots, ranks
from reduction.tokens import Signals, Tokens


class Draw(NamedTuple):
    """What a random score follows from.

    Attributes:
        seed: Another seed, another draw.
        block: Index of the block; every block draws anew.
        anew: Draw from torch's generator, as in training, instead of following the image.
    """

    seed: int = 0
    block: int = 0
    anew: bool = False


def class_attention(t: Tokens, s: Signals, draw: Draw) -> Tensor:
    """What the class token pays, mean over heads."""
    return s.need("cls_row").mean(1)[:, t.prefix :]


def received(t: Tokens, s: Signals, draw: Draw) -> Tensor:
    """What a token receives, mean over heads and queries."""
    return s.need("column")[:, t.prefix :]


def length(t: Tokens, s: Signals, draw: Draw) -> Tensor:
    """Length of the features, as a share of all."""
    exact = torch.promote_types(t.x.dtype, torch.float32)
    return _shares(torch.linalg.vector_norm(t.patches, dim=-1, dtype=exact))


def chance(t: Tokens, s: Signals, draw: Draw) -> Tensor:
    """Nothing about the token: an order drawn by lot, the same for an image in every batch."""
    if draw.anew:
        rank = torch.rand(t.x.shape[0], t.n, device=t.x.device)
    else:
        # Called by itself, without images, the tokens stand for them.
        lot = t.memory["lot"] if "lot" in t.memory else lots(t.x)
        rank = ranks(lot, t.n, draw.seed, draw.block)
    return _shares(rank.argsort(dim=1).argsort(dim=1).float() + 1)


def inverse(t: Tokens, s: Signals, draw: Draw) -> Tensor:
    """The class token's attention turned upside down: what it pays least comes first."""
    a = class_attention(t, s, draw)
    a = a.to(torch.promote_types(a.dtype, torch.float32))
    return _shares((a.amax(1, keepdim=True) + a.amin(1, keepdim=True) - a).clamp_min(0))


def significance(attention: Tensor, v: Tensor, live: Tensor | None = None) -> Tensor:
    """Share of each token in the attention of the class token, weighed by its value, `(B, N)`.

    Args:
        attention: Attention to each token `(B, N)`, up to a factor.
        v: Values `(B, H, N, d)`; their length is over all heads together.
        live: Tokens that are no padding, `(B, N)`; None is all.
    """
    exact = torch.promote_types(v.dtype, torch.float32)
    length = torch.linalg.vector_norm(v, dim=(1, 3), dtype=exact)
    score = attention.to(exact) * length
    score = score if live is None else score.masked_fill(~live, 0.0)
    share: Tensor = score / score.sum(1, keepdim=True).clamp_min(torch.finfo(exact).tiny)
    return share


def distance(a: Tensor, b: Tensor, kind: str = "l2") -> Tensor:
    """How far rows are apart, `(B, N)` in float32 or better.

    Args:
        a: `(B, N, C)`.
        b: Likewise.
        kind: "l2", "l1", or "cosine" (one minus it).
    """
    exact = torch.promote_types(a.dtype, torch.float32)
    a, b = a.to(exact), b.to(exact)
    if kind == "cosine":
        return 1 - torch.nn.functional.cosine_similarity(a, b, dim=-1)
    apart: Tensor = torch.linalg.vector_norm(a - b, ord=1 if kind == "l1" else 2, dim=-1)
    return apart


@torch.no_grad()
def saliency(attention: Tensor, prefix: int = 0, live: Tensor | None = None) -> Tensor:
    """Weight of every patch, `(B, N)`: 0 for background, up to 1 for the most focused.

    Args:
        attention: Map `(B, H, P+N, P+N)` after the softmax, without a size bias.
        prefix: P.
        live: Patches that are no padding, `(B, N)`; None is all. The weight of others says nothing.
    """
    p = attention.to(torch.promote_types(attention.dtype, torch.float32)).mean(1)
    focus = torch.special.xlogy(p, p).sum(-1)[:, prefix:]
    if live is None:
        low, high = focus.amin(1, keepdim=True), focus.amax(1, keepdim=True)
    else:
        low = focus.masked_fill(~live, torch.inf).amin(1, keepdim=True)
        high = focus.masked_fill(~live, -torch.inf).amax(1, keepdim=True)
    spread = high - low
    u = (focus - low) / torch.where(spread > 0, spread, 1.0)
    if live is None:
        above = u - u.mean(1, keepdim=True)
    else:
        above = u - (u * live).sum(1, keepdim=True) / live.sum(1, keepdim=True)
        above = above.masked_fill(~live, -1.0)
    most = above.amax(1, keepdim=True)
    weight = (above / torch.where(most > 0, most, 1.0)).clamp_min(0)
    # Where all look alike, none is background.
    return torch.where(most > 0, weight, 1.0)


def representation_shift(t: Tokens, s: Signals, draw: Draw) -> Tensor:
    """How far the MLP's answer is from what it was asked about, as a share of all."""
    shift = distance(s.need("mlp"), s.need("x_mid"))
    return _shares(shift[:, t.prefix :])


class Score(NamedTuple):
    """A score and the signals that it reads."""

    function: Callable[[Tokens, Signals, Draw], Tensor]
    needs: frozenset[str] = frozenset()


_CLASS, _COLUMN = frozenset({"cls_row"}), frozenset({"column"})

#: What `score` of a ranking method may be.
SCORES: dict[str, Score] = {
    "class": Score(class_attention, _CLASS),
    "column_mean": Score(received, _COLUMN),
    "column": Score(received, _COLUMN),
    "norm": Score(length),
    "random": Score(chance),
    "inverse": Score(inverse, _CLASS),
    "repshift": Score(representation_shift, frozenset({"x_mid", "mlp"})),
}
#: What `score_from` may be: the attention that published methods rank by, and ours without a class.
ATTENTION = ("class", "column_mean")


def score_named(name: str) -> Score:
    """The score of a name.

    Raises:
        ZooError: With the names that exist.
    """
    return SCORES[one_of("score", name, SCORES)]


def _shares(x: Tensor) -> Tensor:
    return x / x.sum(1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
