"""Methods that compute attention themselves, or take part in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from reduction.counts import Step
from reduction.functional.attention import attention
from reduction.functional.neighbours import rows_of_heads
from reduction.tokens import Signals, Tokens


class AttentionInput(NamedTuple):
    """What one attention is about to compute, for reducers that act inside it.

    Attributes:
        q: Queries `(B, H, P+N, d)`, rotated where the model has rotary embedding.
        k: Keys, likewise.
        v: Values.
        scale: Factor on the logits.
        bias: Added to the logits, broadcastable to `(B, H, P+N, P+N)`, or None.
        dropout: Dropout rate of the attention weights.
        fused: Whether the model allows a fused kernel.
        need: Signals that are wanted.
        class_tokens: Leading tokens that together act as the class token.
        again: What the attention would compute for other tokens of the residual stream; with True
            only `v` of it is filled. Given where `OwnAttention.rereads` says so.
        drop: Dropout of the attention weights where somebody watches it; see `dropped`.
        x: What queries, keys and values were computed from, `(B, P+N, C)`.
        free: Whether tokens have changed, so that nothing has to equal the tower's kernel to the
            last bit.
        live: Tokens that are no padding, `(B, P+N)`; None where all are.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    bias: Tensor | None
    dropout: float
    fused: bool
    need: frozenset[str]
    class_tokens: int = 1
    again: Callable[[Tokens, bool], AttentionInput] | None = None
    drop: Callable[[Tensor], Tensor] | None = None
    x: Tensor | None = None
    free: bool = False
    live: Tensor | None = None

    def logits(self) -> Tensor:
        """Scaled products of queries and keys with the bias added, `(B, H, P+N, P+N)`."""
        logits = (self.q * self.scale) @ self.k.transpose(-2, -1)
        return logits if self.bias is None else logits + self.bias.to(logits.dtype)

    def of_queries(self, rows: Tensor) -> AttentionInput:
        """The same for some of the queries.

        Args:
            rows: Which, `(B, R)`, counted with the prefix.
        """
        q, bias = rows_of_heads(self.q, rows), self.bias
        live = None if self.live is None else self.live.gather(1, rows)
        if bias is not None and bias.shape[2] > 1:  # a bias on the keys alone is one row for all
            bias = bias.expand(len(rows), -1, -1, -1)
            index = rows[:, None, :, None].expand(-1, bias.shape[1], -1, bias.shape[3])
            bias = bias.gather(2, index)
        return self._replace(q=q, bias=bias, live=live)

    def among(self, rows: Tensor) -> AttentionInput:
        """The same for some tokens, as queries and as keys; what is added to logits goes along.

        Args:
            rows: Which, `(B, R)`, counted with the prefix.
        """
        found = self.of_queries(rows)
        bias = found.bias
        if bias is not None:
            _, heads, queries, _ = bias.shape
            index = rows[:, None, None].expand(-1, heads, queries, -1)
            bias = bias.expand(len(rows), -1, -1, -1).gather(3, index)
        k, v = rows_of_heads(self.k, rows), rows_of_heads(self.v, rows)
        return found._replace(k=k, v=v, bias=bias)

    def plus(self, bias: Tensor | None) -> AttentionInput:
        """The same with more added to its logits, broadcastable to `(B, H, P+N, P+N)`."""
        if bias is None:
            return self
        bias = bias.to(self.q.dtype)
        return self._replace(bias=bias if self.bias is None else self.bias.to(bias.dtype) + bias)

    def usual(self, policy: Tensor | None = None) -> tuple[Tensor, Signals]:
        """What a block without a method of its own computes: output `(B, H, P+N, d)` and signals.

        Args:
            policy: Keep mask `(B, P+N)` for the masked softmax.
        """
        return attention(
            self.q,
            self.k,
            self.v,
            scale=self.scale,
            bias=self.bias,
            dropout=self.dropout,
            fused=self.fused,
            need=self.need,
            policy=policy,
            class_tokens=self.class_tokens,
            drop=self.drop,
            free=self.free,
            live=self.live,
        )

    def dropped(self, map_: Tensor) -> Tensor:
        """Attention weights as they meet the values: the one way there, so that they can be seen.

        Args:
            map_: `(B, H, queries, keys)`, after the softmax.
        """
        return F.dropout(map_, self.dropout) if self.drop is None else self.drop(map_)


class AttentionOutput(NamedTuple):
    """Result of an attention that a reducer computed itself.

    Attributes:
        out: `(B, H, P+M, d)`; M is N unless tokens were removed inside.
        signals: What was wanted.
        tokens: The residual stream with M reducible tokens if it changed, else None.
    """

    out: Tensor
    signals: Signals
    tokens: Tokens | None = None


class InAttention:
    """A method that takes part in attentions; base of the two ways to do so."""

    def inside(self, t: Tokens) -> bool:
        """Whether the method takes part in the attention that these tokens are about to enter.

        Where it says no, a block runs as it does for all other methods.
        """
        return True


class ExtraKeys(InAttention):
    """A method that adds keys to the attention of reducing blocks."""

    def extra_keys(self, t: Tokens, step: Step) -> Tensor | None:
        """Rows `(B, G, C)` that take part in a reducing block's attention and then are gone.

        They are keys and queries without a position, and the signals do not show them.
        """
        raise NotImplementedError(f"{type(self).__name__} must override extra_keys")


class OwnAttention(InAttention):
    """A method that computes the attention of blocks itself.

    Attributes:
        rereads: What `attend` computes again, with `AttentionInput.again`, from the tokens that it
            has reduced: "values", which then are not computed before; "all"; or "no".
    """

    rereads: Literal["no", "values", "all"] = "no"

    def attend(self, a: AttentionInput, t: Tokens, step: Step | None) -> AttentionOutput | None:
        """Replace the attention of a block, or leave it alone by returning None.

        Called in every block for which `inside` said yes. With `site = "attn"` and a step, the
        returned tokens are the residual stream that the (shorter) output is added to.
        """
        raise NotImplementedError(f"{type(self).__name__} must override attend")

    def attention_macs(self, n: int, kept: int, width: int) -> int:
        """Multiply-accumulates of the two attention products.

        Args:
            n: Tokens entering, prefix included.
            kept: Rows that are computed: n, or fewer where tokens are removed inside.
            width: Heads times head width.
        """
        return 2 * n * kept * width
