"""The straightforward form of each method: what a careful person writes first.

These are what the package is measured against, and what its results must equal. Every block
computes the whole attention map with an explicit softmax; tokens are split by strided slices,
gathered with expanded indices and merged with `scatter_reduce`; K-Medoids loops over its clusters.
Plain DeiT models with one class token only, inference only.

Shapes: B batch, N tokens with the class token, C width, H heads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reduction.counts import Step


class State(NamedTuple):
    """Tokens `(B, N, C)`, sizes `(B, N, 1)`, and what the last attention said."""

    x: Tensor
    size: Tensor
    attn: Tensor | None = None
    key: Tensor | None = None


Reduce = Callable[[State, Step, Any], tuple[Tensor, Tensor]]


class Straightforward(nn.Module):
    """A DeiT with a method written plainly.

    Args:
        backbone: timm's.
        method: Name in `METHODS`, or None for the dense model.
        steps: The reduction of each block, None where nothing happens.
        reducer: The package's, for learned weights and arguments.
    """

    def __init__(self, backbone: Any, method: str | None, steps: Any, reducer: Any) -> None:
        super().__init__()
        self.backbone, self.reducer, self.steps = backbone, reducer, steps
        self.site, self.sizes, self.reduce = METHODS[method] if method else ("", False, None)

    def forward(self, images: Tensor) -> Tensor:
        """Logits `(B, classes)`."""
        m = self.backbone
        x = m.norm_pre(m._pos_embed(m.patch_embed(images)))
        s = State(x, torch.ones_like(x[..., :1]))
        for block, step in zip(m.blocks, self.steps, strict=True):
            if self.site == "pre":
                s = self._apply(s, step)
            out, attn, key = self._attention(block.attn, block.norm1(s.x), s.size)
            s = State(s.x + out, s.size, attn, key)
            if self.site == "mid":
                s = self._apply(s, step)
            s = s._replace(x=s.x + block.mlp(block.norm2(s.x)))
            if self.site == "post":
                s = self._apply(s, step)
        return m.head(m.norm(s.x)[:, 0])

    def _apply(self, s: State, step: Step | None) -> State:
        if step is None or self.reduce is None:
            return s
        x, size = self.reduce(s, step, self.reducer)
        return s._replace(x=x, size=size)

    def _attention(self, attn: Any, x: Tensor, size: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch, n, width = x.shape
        qkv = attn.qkv(x).reshape(batch, n, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        map_ = q * attn.scale @ k.transpose(-2, -1)
        if self.sizes:
            map_ = map_ + size.log()[:, None, None, :, 0]
        map_ = map_.softmax(-1)
        out = (map_ @ v).transpose(1, 2).reshape(batch, n, width)
        return attn.proj(out), map_, k


def gather(x: Tensor, index: Tensor) -> Tensor:
    """Rows `(B, M, C)` by an expanded index."""
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def _class_score(s: State) -> Tensor:
    assert s.attn is not None
    return s.attn[:, :, 0, 1:].mean(1)


def _with_class(s: State, x: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    return torch.cat([s.x[:, :1], x], 1), torch.cat([s.size[:, :1], size], 1)


def topk(s: State, step: Step, reducer: Any) -> tuple[Tensor, Tensor]:
    """Keep the tokens that the class token attends to most."""
    index = _class_score(s).topk(step.keep, dim=1).indices
    return _with_class(s, gather(s.x[:, 1:], index), gather(s.size[:, 1:], index))


def evit(s: State, step: Step, reducer: Any) -> tuple[Tensor, Tensor]:
    """Top-K, and the others gathered and added up by their attention."""
    score = _class_score(s)
    order = score.argsort(dim=1, descending=True)
    index, rest = order[:, : step.keep], order[:, step.keep :]
    x, size = s.x[:, 1:], s.size[:, 1:]
    extra = (gather(x, rest) * score.gather(1, rest).unsqueeze(-1)).sum(1, keepdim=True)
    count = gather(size, rest).sum(1, keepdim=True)
    return _with_class(
        s, torch.cat([gather(x, index), extra], 1), torch.cat([gather(size, index), count], 1)
    )


def _bipartite(s: State, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """ToMe's matching: staying and leaving senders, and the receivers of the latter."""
    assert s.key is not None
    metric = s.key.mean(1)
    metric = metric / metric.norm(dim=-1, keepdim=True)
    scores = metric[:, ::2] @ metric[:, 1::2].transpose(-1, -2)
    scores[:, 0] = -torch.inf
    best, nearest = scores.max(-1)
    order = best.argsort(dim=-1, descending=True)
    stay, source = order[:, r:].sort(dim=1).values, order[:, :r]
    return stay, source, nearest.gather(1, source)


def _scatter(x: Tensor, index: Tensor, values: Tensor, how: str) -> Tensor:
    wide = index.unsqueeze(-1).expand(-1, -1, x.shape[-1])
    return x.scatter_reduce(1, wide, values, reduce=how)


def tome(s: State, step: Step, reducer: Any) -> tuple[Tensor, Tensor]:
    """Size-weighted means of the most similar pairs."""
    r = s.x.shape[1] - 1 - step.keep
    stay, source, target = _bipartite(s, r)

    def merged(x: Tensor) -> Tensor:
        senders, receivers = x[:, ::2], x[:, 1::2]
        receivers = _scatter(receivers, target, gather(senders, source), "sum")
        return torch.cat([gather(senders, stay), receivers], 1)

    x, size = merged(s.x * s.size), merged(s.size)
    return x / size, size


def tofu(s: State, step: Step, reducer: Any) -> tuple[Tensor, Tensor]:
    """Drop in the first half, merge with the length kept in the second."""
    r = s.x.shape[1] - 1 - step.keep
    stay, source, target = _bipartite(s, r)
    senders, receivers = s.x[:, ::2], s.x[:, 1::2]
    kept = gather(senders, stay)
    if step.block > step.depth // 2:
        moved = gather(senders, source)
        length = _scatter(
            receivers.norm(dim=-1, keepdim=True), target, moved.norm(dim=-1, keepdim=True), "amax"
        )
        mean = _scatter(receivers, target, moved, "mean")
        got = _scatter(torch.zeros_like(length), target, torch.ones_like(moved[..., :1]), "amax")
        scaled = mean / mean.norm(dim=-1, keepdim=True) * length
        receivers = torch.where(got > 0, scaled, receivers)
    x = torch.cat([kept, receivers], 1)
    return x, torch.ones_like(x[..., :1])


def pitome(s: State, step: Step, reducer: Any) -> tuple[Tensor, Tensor]:
    """Rank by energy, pair within the ranking, protect the rest."""
    assert s.key is not None
    x, size = s.x[:, 1:], s.size[:, 1:]
    r = x.shape[1] - step.keep
    metric = F.normalize(s.key[:, :, 1:].mean(1), dim=-1)
    similarity = metric @ metric.transpose(-1, -2)
    margin = reducer.margin_of(step.block, step.depth)
    rank = F.elu(similarity - margin).mean(-1).argsort(dim=1, descending=True)
    if reducer.mode_of(step.block, step.depth) == "pitome":
        protected, pool = rank[:, 2 * r :], rank[:, : 2 * r]
    else:
        protected, pool = rank[:, :0], rank
    senders, receivers = pool[:, ::2], pool[:, 1::2]
    scores = gather(metric, senders) @ gather(metric, receivers).transpose(-1, -2)
    best, nearest = scores.max(-1)
    order = best.argsort(dim=1, descending=True)
    if len(protected[0]):
        order = torch.arange(r, device=x.device).expand(x.shape[0], -1)
    source, stay = order[:, :r], order[:, r:]
    target = nearest.gather(1, source)

    def merged(y: Tensor) -> Tensor:
        a, b = gather(y, senders), gather(y, receivers)
        b = _scatter(b, target, gather(a, source), "sum")
        return torch.cat([gather(y, protected), gather(a, stay), b], 1)

    new = merged(size)
    return _with_class(s, merged(x * size) / new, new)


def diffrate(s: State, step: Step, reducer: Any) -> tuple[Tensor, Tensor]:
    """Sort by attention, drop the tail, merge what is next into its most similar token."""
    order = _class_score(s).argsort(dim=1, descending=True)
    x, size = gather(s.x[:, 1:], order), gather(s.size[:, 1:], order)
    left = x.shape[1] if step.budget.prune is None else max(step.keep, step.budget.prune)
    left = min(left, x.shape[1])
    x, size = x[:, :left], size[:, :left]
    if left > step.keep:
        unit = x / x.norm(dim=-1, keepdim=True)
        scores = unit[:, step.keep :] @ unit[:, : step.keep].transpose(-1, -2)
        best, target = scores.max(-1)
        members = torch.ones_like(size[:, : step.keep])
        members = _scatter(members, target, torch.ones_like(size[:, step.keep :]), "sum")
        moved = size[:, step.keep :] * best.unsqueeze(-1)
        size = _scatter(size[:, : step.keep], target, moved, "sum")
        x = _scatter(x[:, : step.keep], target, x[:, step.keep :], "sum") / members
    return _with_class(s, x, size)


def kmedoids(distance: Tensor, medoid: Tensor, weight: Tensor, iterations: int) -> Any:
    """Weighted K-Medoids with a loop over the clusters.

    Args:
        distance: `(B, N, N)`.
        medoid: First medoids `(B, K)`.
        weight: `(B, N)`.
        iterations: Always so many.

    Returns:
        Medoids `(B, K)` and the cluster of each point `(B, N)`.
    """
    batch, n, _ = distance.shape
    images = torch.arange(batch).unsqueeze(1)

    def assigned(medoid: Tensor) -> Tensor:
        columns = distance.gather(2, medoid.unsqueeze(1).expand(-1, n, -1))
        slot = columns.argmin(2)
        own = torch.arange(medoid.shape[1]).expand_as(medoid)
        slot[images, medoid] = own
        return slot

    for _ in range(iterations):
        slot = assigned(medoid)
        new = []
        for k in range(medoid.shape[1]):
            inside = slot == k
            cost = (distance * (weight * inside).unsqueeze(1)).sum(2)
            new.append(cost.masked_fill(~inside, torch.inf).argmin(1))
        medoid = torch.stack(new, 1)
    medoid = medoid.sort(1).values
    return medoid, assigned(medoid)


def token_pooling(s: State, step: Step, reducer: Any) -> tuple[Tensor, Tensor]:
    """K-Medoids of the tokens, weighted by the attention that they receive."""
    assert s.attn is not None
    x, size = s.x[:, 1:], s.size[:, 1:]
    score = s.attn.mean((1, 2))[:, 1:]
    score = (score / score.mean(1, keepdim=True)).clamp_min(1e-6)
    first = score.argsort(dim=1, descending=True, stable=True)[:, : step.keep].sort(1).values
    # In double precision: a distance that is off by rounding would tie differently.
    distance = torch.cdist(x.double(), x.double()).square().to(x.dtype)
    _, slot = kmedoids(distance, first, score, reducer.iterations)
    zero = x.new_zeros(x.shape[0], step.keep, 1)
    weight = score.unsqueeze(-1)
    total = _scatter(zero, slot, weight, "sum")
    mean = _scatter(zero.expand(-1, -1, x.shape[-1]).clone(), slot, x * weight, "sum") / total
    return _with_class(s, mean, _scatter(zero, slot, size, "sum"))


def dpcknn(s: State, step: Step, reducer: Any) -> tuple[Tensor, Tensor]:
    """Density peaks with `cdist` and masks, weighted means."""
    x, size = s.x[:, 1:], s.size[:, 1:]
    batch, n, width = x.shape
    distance = torch.cdist(x.double(), x.double()).to(x.dtype) / width**0.5
    near = distance.topk(min(reducer.neighbors, n), dim=-1, largest=False).values
    density = (-near.square().mean(-1)).exp()
    mask = (density[:, None, :] > density[:, :, None]).to(x.dtype)
    farthest = distance.flatten(1).max(1).values[:, None, None]
    gap = (distance * mask + farthest * (1 - mask)).min(-1).values
    centres = (gap * density).topk(step.keep, dim=1).indices
    slot = gather(distance, centres).argmin(1)
    slot[torch.arange(batch).unsqueeze(1), centres] = torch.arange(step.keep).expand(batch, -1)
    weight = reducer.stage(step)["score"](x).exp()
    zero = x.new_zeros(batch, step.keep, 1)
    total = _scatter(zero, slot, weight, "sum") + 1e-6
    share = weight / total.gather(1, slot.unsqueeze(-1))
    mean = _scatter(zero.expand(-1, -1, width).clone(), slot, x * share, "sum")
    return _with_class(s, mean, _scatter(zero, slot, size, "sum"))


def patchmerger(s: State, step: Step, reducer: Any) -> tuple[Tensor, Tensor]:
    """Queries pool the tokens."""
    x, size = s.x[:, 1:], s.size[:, 1:]
    stage = reducer.stage(step)
    z = stage.norm(x)
    weights = (stage.queries @ z.transpose(1, 2)).softmax(-1)
    new = (size.sum(1, keepdim=True) / step.keep).expand(-1, step.keep, -1)
    return _with_class(s, weights @ z, new)


#: Method to site, whether sizes enter the attention, and how it reduces.
METHODS: dict[str, tuple[str, bool, Reduce]] = {
    "tome": ("mid", True, tome),
    "topk": ("mid", False, topk),
    "evit": ("mid", False, evit),
    "pitome": ("mid", False, pitome),
    "tofu": ("mid", False, tofu),
    "diffrate": ("mid", True, diffrate),
    "token_pooling": ("post", False, token_pooling),
    "dpcknn": ("pre", False, dpcknn),
    "patchmerger": ("pre", False, patchmerger),
}


def straightforward(model: Any) -> Straightforward:
    """The straightforward form of a `ReducedViT`, on the same weights.

    Raises:
        KeyError: If the method has none here.
    """
    steps = [plan.step for plan in model.plan()]
    method = None if model.reducer is None else model.reducer.name
    return Straightforward(model.backbone, method, steps, model.reducer).eval()
