"""Tokens that stand for no patch: appended behind the others, and kept out of a reduction.

Shapes as in `reduction.tokens`; A is the number of appended tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reduction.tokens import Signals, Tokens


def append(t: Tokens, x: Tensor) -> Tokens:
    """Put tokens without a position behind the others; each counts as one patch.

    Args:
        t: Tokens with N reducible tokens.
        x: Features `(B, A, C)`.

    Returns:
        Tokens with N + A reducible tokens: size one, origin -1, visible to attention.
    """
    batch, added = x.shape[:2]
    return t._replace(
        x=torch.cat([t.x, x.to(t.x.dtype)], dim=1),
        size=torch.cat([t.size, t.size.new_ones(batch, added)], dim=1),
        origin=_extend(t.origin, batch, added, -1),
        policy=_extend(t.policy, batch, added, 1),
        mask=_extend(t.mask, batch, added, 1),
    )


def split_tail(t: Tokens, count: int) -> tuple[Tokens, Tokens]:
    """Take the last tokens out.

    The source map stays with the first part: patches are never held by appended tokens that no
    reduction has seen.

    Args:
        t: Tokens with N reducible tokens.
        count: How many to take, below N.

    Returns:
        The first N - `count` reducible tokens with everything else in `t`, and the rest.
    """
    body = _rows(t, slice(None, t.x.shape[1] - count), slice(None, t.n - count))
    rest = _rows(t, slice(t.x.shape[1] - count, None), slice(t.n - count, None))
    return body, rest._replace(prefix=0, source=None, grid=None)


def join_tail(t: Tokens, rest: Tokens) -> Tokens:
    """Put back what `split_tail` took out, whatever happened to the others meanwhile."""
    batch, count = rest.x.shape[:2]

    def joined(body: Tensor | None, tail: Tensor | None, fill: int) -> Tensor | None:
        if body is None or tail is None:
            return _extend(body, batch, count, fill)
        return torch.cat([body, tail], dim=1)

    return t._replace(
        x=torch.cat([t.x, rest.x], dim=1),
        size=torch.cat([t.size, rest.size], dim=1),
        origin=joined(t.origin, rest.origin, -1),
        policy=joined(t.policy, rest.policy, 1),
        mask=joined(t.mask, rest.mask, 1),
    )


def trim(s: Signals, length: int) -> Signals:
    """Signals of the first `length` tokens, prefix included; shorter ones stay as they are.

    A signal keeps its scale: attention that went to the other tokens is not redistributed.
    """

    def rows(x: Tensor | None) -> Tensor | None:
        return None if x is None else x[:, :length]

    def heads(x: Tensor | None) -> Tensor | None:
        return None if x is None else x[:, :, :length]

    return Signals(
        k=heads(s.k),
        v=heads(s.v),
        cls_row=heads(s.cls_row),
        column=rows(s.column),
        attn=None if s.attn is None else s.attn[:, :, :length, :length],
        x_norm=rows(s.x_norm),
        out=heads(s.out),
        x_in=rows(s.x_in),
        x_mid=rows(s.x_mid),
        mlp=rows(s.mlp),
    )


def _rows(t: Tokens, rows: slice, patches: slice) -> Tokens:
    return t._replace(
        x=t.x[:, rows],
        size=t.size[:, rows],
        origin=None if t.origin is None else t.origin[:, patches],
        policy=None if t.policy is None else t.policy[:, rows],
        mask=None if t.mask is None else t.mask[:, rows],
    )


def _extend(x: Tensor | None, batch: int, count: int, fill: int) -> Tensor | None:
    # Of a mask too: tracers know no Boolean to fill with.
    return None if x is None else torch.cat([x, x.new_full((batch, count), fill)], dim=1)
