"""Squeezing: kept tokens absorb the dropped ones that resemble them most.

Shapes: B batch, N tokens, D dropped and M kept ones, C width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from reduction.assignment import Merge
from reduction.functional.clustering import LARGE, group_exp, mean_shares
from reduction.functional.joining import Decision
from reduction.functional.portable import best_of
from reduction.tokens import Tokens, take_rows

#: Weight of a kept token in its own group, whatever the temperature.
_OWN = math.e


def _unit(x: Tensor) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / (length + 1e-6)


def squeeze(t: Tokens, kept: Tensor, dropped: Tensor, temperature: float = 1.0) -> Merge:
    """Each dropped token joins the kept one that it resembles most.

    With `c` the cosine over the temperature, a group is `(e x_j + sum exp(c_i) x_i) / (e + sum
    exp(c_i))`. Gradient flows through the cosines, not through the choices.

    Args:
        t: Tokens with N reducible tokens.
        kept: `(B, M)`, leaders of the groups.
        dropped: All others `(B, D)`.
        temperature: Divides the cosines.
    """
    direction = _unit(t.patches)
    cosine = take_rows(direction, dropped) @ take_rows(direction, kept).transpose(1, 2)
    best, host = best_of(cosine)
    weight, own = _weights(best.float() / temperature, host, kept.shape[1], temperature)
    total = own.scatter_add(1, host, weight)
    return Merge(None, kept, coef=weight / total.gather(1, host), pairs=(dropped, host))


def _weights(z: Tensor, host: Tensor, m: int, temperature: float) -> tuple[Tensor, Tensor]:
    """Weights `exp(z)` of the others `(B, D)`, and of their hosts themselves `(B, M)`."""
    if temperature * LARGE >= 1:  # No cosine over the temperature is above that.
        return z.exp(), z.new_full((z.shape[0], m), _OWN)
    weight, shift = group_exp(z, host, m)
    return weight, _OWN * (-shift).exp()


def squeezed(t: Tokens, d: Decision, temperature: float = 1.0) -> Merge:
    """Groups as they are, with these weights.

    Args:
        t: Tokens.
        d: Who merges, and how alike they are.
        temperature: Divides the cosines.
    """
    a, best = d.joined(t), d.pairs.best
    assert a.slot is not None
    best = best.to(torch.promote_types(best.dtype, torch.float32)) / temperature
    z = d.of_tokens(best, best.new_ones(a.slot.shape))
    k = a.leader.shape[1]
    bins = torch.where(a.slot < 0, k, a.slot)
    weight, _ = group_exp(z, bins, k + 1)
    return a._replace(coef=mean_shares(weight, bins, k + 1))


def squeeze_masked(x: Tensor, kept: Tensor, gone: Tensor, temperature: float = 1.0) -> Tensor:
    """The same while training with masks: every token stays, and kept ones absorb.

    Gradient reaches the decisions through the weights `exp(c g) g`, g being `gone`.

    Args:
        x: Features `(B, N, C)`.
        kept: One where a token is kept, `(B, N)`.
        gone: One where a token leaves in this step, `(B, N)`.
        temperature: Divides the cosines.

    Returns:
        `(B, N, C)`.
    """
    direction = _unit(x)
    with torch.no_grad():
        cosine = direction @ direction.transpose(1, 2)
        alone = torch.eye(x.shape[1], dtype=torch.bool, device=x.device)
        taboo = alone | (kept < 0.5).unsqueeze(1)
        best, host = cosine.masked_fill(taboo, -torch.inf).max(-1)
    near = (direction * take_rows(direction, host)).sum(-1).float() / temperature
    # Where nothing is kept there is no host; the weight is then as good as zero.
    near = torch.where(best.isfinite(), near, -100.0)
    weight, own = _weights(near * gone, host, x.shape[1], temperature)
    weight = weight * gone
    total = own.scatter_add(1, host, weight)
    batch, n, width = x.shape
    flat = (host + torch.arange(batch, device=x.device).unsqueeze(1) * n).reshape(-1)
    moved = (x.to(weight.dtype) * weight.unsqueeze(-1)).reshape(-1, width)
    mixed = (x.to(weight.dtype) * own.unsqueeze(-1)).reshape(-1, width).index_add(0, flat, moved)
    return (mixed.view(batch, n, width) / total.unsqueeze(-1)).to(x.dtype)
