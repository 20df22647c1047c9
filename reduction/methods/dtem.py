"""DTEM: merge tokens by an embedding that was learned for merging."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from reduction.assignment import Keep, Merge, apply
from reduction.base import Card
from reduction.checks import boolean, count, one_of, positive
from reduction.counts import Dims, Spec, Step
from reduction.errors import ZooError
from reduction.functional.clustering import no_autocast
from reduction.functional.matching import bipartite_matching, split_sizes, unit
from reduction.functional.portable import stable_order
from reduction.mixins.attention import AttentionInput, AttentionOutput, OwnAttention
from reduction.mixins.learned import Learned
from reduction.mixins.masking import Masked
from reduction.mixins.pairing import Pairs
from reduction.registry import register
from reduction.tokens import Signals, Tokens

SPLITS = ("official", "eval")


def relaxed_top_r(score: Tensor, r: int, temperature: float) -> Tensor:
    """Draw `r` pairs without replacement of their rows, softly.

    Each round takes a softmax over all pairs and lowers every row by the logarithm of what it has
    not given yet. As the temperature falls this becomes the `r` rows with the best pairs.

    Args:
        score: `(B, A, K)`.
        r: Rounds.
        temperature: Of the softmax.

    Returns:
        How often each pair was taken, `(B, A, K)`; adds up to `r`.
    """
    eps = torch.finfo(score.dtype).eps
    taken = torch.zeros_like(score)
    for _ in range(r):
        p = (score / temperature).flatten(1).softmax(1).view_as(score)
        taken = taken + p
        score = score + (1 - p.sum(2, keepdim=True)).clamp_min(eps).log()
    return taken


def soft_assignment(
    source: Tensor, goal: Tensor, r: int, neighbors: int, tau1: float, tau2: float
) -> Tensor:
    """Differentiable matching: which share of each source goes to which goal.

    Args:
        source: Embeddings `(B, A, F)`.
        goal: Embeddings `(B, M, F)`.
        r: Merges.
        neighbors: Goals that each source may choose from, its most similar ones.
        tau1: Divides the cosines.
        tau2: Temperature of the softmax over pairs.

    Returns:
        `(B, A, M)`; no row adds up to more than one.
    """
    cosine = unit(source) @ unit(goal).transpose(1, 2)
    best, index = cosine.topk(min(neighbors, goal.shape[1]), dim=2)
    taken = relaxed_top_r(best / tau1, r, tau2)
    # A row taken more than once gives itself once; the divisor carries no gradient.
    share = taken / taken.sum(2, keepdim=True).clamp_min(1).detach()
    return torch.zeros_like(cosine).scatter(2, index, share)


def sized_attention(a: AttentionInput, size: Tensor) -> Tensor:
    """Attention `exp(q.k) * size`, normalised; unlike log(size) it has a gradient at size 0.

    Args:
        a: What the block would compute.
        size: `(B, P+N)`.

    Returns:
        `(B, H, P+N, d)`.
    """
    logits = ((a.q * a.scale) @ a.k.transpose(-2, -1)).to(size.dtype)
    weight = (logits - logits.detach().amax(-1, keepdim=True)).exp() * size[:, None, None, :]
    weight = weight / weight.sum(-1, keepdim=True).clamp_min(torch.finfo(size.dtype).tiny)
    return a.dropped(weight.to(a.v.dtype)) @ a.v


@register("dtem")
class DTEM(Learned, Masked, OwnAttention, Pairs):
    """Decoupled Token Embedding for Merging.

    One linear layer per block maps the normalised input of the attention to an embedding
    `e = W LN(x) + b` that serves for nothing but merging, and is detached from the backbone.

    In evaluation this is ToMe with `e` in place of the keys. In training no token is removed: the
    choice of the r best pairs is relaxed, sizes become soft, and attention weighs each key by its
    size. Sources `a` and goals `b` alternate; with the assignment `M` (rows add up to at most one)

        x_b <- (s_b x_b + M^T (s_a x_a)) / (s_b + M^T s_a)
        s_b <- s_b + M^T s_a        s_a <- s_a (1 - sum_b M)

    Tokens are then sorted by size, and the last r take no further part but stay visible as keys
    with what size they have left. Sizes and `x_b` are how the gradient reaches the embedding.

    Args:
        feat_dim: Width of the embedding; None: the head width, twice that from C = 1024 on.
        prop_attn: Proportional attention in evaluation; training always weighs keys by size.
        neighbors: In training, goals that each source may choose from.
        tau1: In training, divides the cosines.
        tau2: In training, temperature of the relaxed choice.
        train_split: "official" swaps the two sets in training, as the official code does; "eval"
            trains with the sets of evaluation.

    Raises:
        ZooError: If an argument is out of range.

    References:
        Lee and Hong, NeurIPS 2024, arXiv 2412.10569; official code github.com/movinghoon/DTEM
        (this implementation is written from a specification, not from that code).
    """

    card = Card(
        title="Learning to Merge Tokens via Decoupled Embedding for Efficient Vision Transformers",
        authors="Lee and Hong",
        venue="NeurIPS",
        year=2024,
        arxiv="2412.10569",
        code="https://github.com/movinghoon/DTEM",
        licence="none",
        kind="merge",
        training="an embedding per block; the backbone may stay frozen",
        note="An untrained embedding merges by a random projection of the features.",
    )
    site = "mid"
    family = "constant_r"
    needs = frozenset({"x_norm"})
    added_tokens = "spare"

    def __init__(
        self,
        feat_dim: int | None = None,
        prop_attn: bool = True,
        neighbors: int = 3,
        tau1: float = 0.1,
        tau2: float = 0.1,
        train_split: str = "official",
    ) -> None:
        super().__init__()
        self.feat_dim = count("feat_dim", feat_dim, null=True)
        self.prop_attn = boolean("prop_attn", prop_attn)
        self.neighbors = count("neighbors", neighbors)
        self.tau1 = positive("tau1", tau1)
        self.tau2 = positive("tau2", tau2)
        self.train_split = one_of("train_split", train_split, SPLITS)
        self.blocks = nn.ModuleDict()
        self._unread: str | None = None

    def _features(self, width: int, head_dim: int) -> int:
        return self.feat_dim or (head_dim if width < 1024 else 2 * head_dim)

    def setup(self, spec: Spec) -> None:
        """One embedding per reducing block, by the block's number; those that fit are kept."""
        features = self._features(spec.width, spec.head_dim)
        old, self.blocks = self.blocks, nn.ModuleDict()
        for step in spec.stages:
            name = str(step.block)
            layer = old[name] if name in old else None
            if layer is None or cast(nn.Linear, layer).weight.shape != (features, spec.width):
                layer = nn.Linear(spec.width, features)
            self.blocks[name] = layer
        last = spec.steps[-1] if spec.steps else None
        self._unread = str(last.block) if last is not None and spec.reads == "class" else None

    def unused(self) -> set[str]:
        """The last block's embedding, where the classifier reads the class token only."""
        if self._unread is None:
            return set()
        return {f"blocks.{self._unread}.{name}" for name in ("weight", "bias")}

    def embed(self, t: Tokens, s: Signals, step: Step) -> Tensor:
        """Embeddings of the reducible tokens, `(B, N, F)`.

        Raises:
            ZooError: If the schedule reduces in a block that it did not reduce in when the model
                was built.
        """
        name = str(step.block)
        if name not in self.blocks:
            raise ZooError(
                f"{self.name} has embeddings for blocks {[int(b) for b in self.blocks]}, but the "
                f"schedule reduces in block {step.block}; build the model with that schedule"
            )
        layer = self.blocks[name]
        embedding: Tensor = layer(s.need("x_norm")[:, t.prefix :].detach())
        return embedding

    def max_drop(self, n: int) -> int:
        return n // 2

    def assign(self, t: Tokens, s: Signals, step: Step) -> Merge:
        with torch.no_grad():
            embedding = self.embed(t, s, step)
        match = bipartite_matching(embedding, t.n - step.keep, t.prefix)
        return Merge(None, match.leader, pairs=(match.source, match.target))

    def pairs_in(self, block: int) -> bool:
        return str(block) in self.blocks

    def alike(self, t: Tokens, s: Signals, step: Step) -> Tensor:
        return self.embed(t, s, step)

    def inside(self, t: Tokens) -> bool:
        return self.masking() and not t.unit

    def attend(self, a: AttentionInput, t: Tokens, step: Step | None) -> AttentionOutput | None:
        return AttentionOutput(sized_attention(a, t.size), Signals())

    def begin(self, t: Tokens) -> Tokens:
        """Sizes alone say what is left of a token."""
        return t

    def mask(self, t: Tokens, s: Signals, step: Step) -> Tokens:
        """Merge softly: nothing leaves."""
        active = active_tokens(t)
        r = min(active - step.keep, self.max_drop(active))
        if r <= 0:
            return t
        embedding = self.embed(t, s, step)[:, :active]
        with no_autocast(t.x):
            order, merged = self._soft_merge(t, embedding.to(t.size.dtype), r)
        rest = torch.arange(active, t.n, device=order.device).expand(order.shape[0], -1)
        sorted_ = apply(merged, Keep(torch.cat([order, rest], 1)))
        return sorted_._replace(unit=False, memory=_active(t, active - r))

    def assignment(self, source: Tensor, goal: Tensor, r: int) -> Tensor:
        """See `soft_assignment`."""
        return soft_assignment(source, goal, r, self.neighbors, self.tau1, self.tau2)

    def _soft_merge(self, t: Tokens, embedding: Tensor, r: int) -> tuple[Tensor, Tokens]:
        """Merge among the active tokens, each in its place, and say how to sort them."""
        active = embedding.shape[1]
        first = t.prefix & 1 if self.train_split == "eval" else 1 - (t.prefix & 1)
        a = torch.arange(first, active, 2, device=t.x.device)
        b = torch.arange(1 - first, active, 2, device=t.x.device)
        move = self.assignment(embedding[:, a], embedding[:, b], r)
        x, size = t.patches.to(size_dtype(t)), t.patch_size
        x_a, x_b, s_a, s_b = x[:, a], x[:, b], size[:, a], size[:, b]
        back = move.transpose(1, 2)
        gain = (back @ s_a.unsqueeze(2)).squeeze(2)
        total = (s_b + gain).clamp_min(torch.finfo(size.dtype).eps).unsqueeze(2)
        x_b = (s_b.unsqueeze(2) * x_b + back @ (s_a.unsqueeze(2) * x_a)) / total
        left = 1 - move.sum(2)
        left = left + (left.clamp(0, 1) - left).detach()
        # Sources first: a stable sort then breaks ties as the concatenation would.
        size = torch.cat([s_a * left, s_b + gain], 1)
        x = torch.cat([x_a, x_b], 1).to(t.x.dtype)
        order = stable_order(size.detach(), descending=True)
        place = torch.cat([a, b])
        end = t.prefix + active
        moved = apply(t, Keep(torch.cat([place, torch.arange(active, t.n, device=a.device)])))
        return order, moved._replace(
            x=torch.cat([t.x[:, : t.prefix], x, t.x[:, end:]], 1),
            size=torch.cat([t.size[:, : t.prefix], size, t.size[:, end:]], 1),
        )

    def macs(self, n: int, prefix: int, step: Step, dims: Dims) -> int:
        features = self._features(dims.width, dims.head_dim)
        senders, receivers = split_sizes(n, prefix)
        return n * dims.width * features + senders * receivers * features


def active_tokens(t: Tokens) -> int:
    """Reducible tokens that still take part while training."""
    return t.memory["active"].shape[0] if "active" in t.memory else t.n


def _active(t: Tokens, count: int) -> dict[str, Tensor]:
    # Its length is the number: known without waiting for a device, and through checkpointing.
    return {**t.memory, "active": t.size.new_empty(count)}


def size_dtype(t: Tokens) -> torch.dtype:
    """What soft merging computes in: at least float32."""
    return torch.promote_types(t.x.dtype, t.size.dtype)
