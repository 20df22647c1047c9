"""ToMA: a few representative tokens, and one matrix that merges all others into them."""

from __future__ import annotations

import torch

from reduction.assignment import Mix, apply
from reduction.base import Card, Reducer
from reduction.checks import boolean, one_of, positive
from reduction.counts import Dims, Step
from reduction.functional.facilities import as_means, facilities, shares
from reduction.functional.matching import head_sum
from reduction.functional.restoring import note_restore
from reduction.mixins.restoring import Restores
from reduction.registry import register
from reduction.tokens import Signals, Tokens

METRICS = ("feature", "key")
RESTORES = ("copy", "soft")


@register("toma")
class ToMA(Restores, Reducer):
    """Token Merge with Attention, as a reducer of vision transformers.

    Between attention and MLP, tokens are chosen one by one so that every token is like one of them
    (greedy facility location by cosine). With `W` the softmax over the chosen ones of
    `scale * cosine`, chosen token d becomes the mean of all tokens weighted by row d of `W`. With
    the published scale nearly every token belongs to one of them alone.

    Published for diffusion transformers, where all images of a batch share one choice. The place in
    a vision transformer, a choice for every image and the sizes are ours.

    Args:
        metric: "feature" (the residual stream) or "key" (sum over heads of the keys; ours).
        scale: Factor on the cosines.
        prop_attn: Proportional attention; ours.
        restore: How dense features come back: "copy", from the chosen token that a patch is most
            like, or "soft", `W^T y`, as published.

    Raises:
        ZooError: If an argument is unknown or out of range.

    References:
        Lu et al., ICML 2025, arXiv 2509.10918; official code github.com/WenboLuu/ToMA (no licence
        found; this implementation is written from a specification).
    """

    card = Card(
        title="ToMA: Token Merge with Attention for Diffusion Models",
        authors="Lu et al.",
        venue="ICML",
        year=2025,
        arxiv="2509.10918",
        code="https://github.com/WenboLuu/ToMA",
        licence="none",
        kind="soft merge",
        training="none",
        note="Its functions are reproduced; using them inside a vision transformer is ours.",
    )
    site = "mid"

    def __init__(
        self,
        metric: str = "feature",
        scale: float = 1000.0,
        prop_attn: bool = True,
        restore: str = "copy",
    ) -> None:
        super().__init__()
        self.metric = one_of("metric", metric, METRICS)
        self.scale = positive("scale", scale)
        self.prop_attn = boolean("prop_attn", prop_attn)
        self.restore = one_of("restore", restore, RESTORES)
        self.needs = frozenset({"k"}) if metric == "key" else frozenset()

    def reduce(self, t: Tokens, s: Signals, step: Step) -> Tokens:
        with torch.no_grad():
            x = t.patches if self.metric == "feature" else head_sum(s.need("k")[:, :, t.prefix :])
            chosen = facilities(x, step.keep)
            share = shares(x, chosen, self.scale)
            mass = (share * t.patch_size.unsqueeze(1)).sum(2)
        out = apply(t, Mix(as_means(share), mass=mass, leader=chosen))
        if t.source is not None:
            slot = share.argmax(1).gather(1, t.source.clamp_min(0))
            out = out._replace(source=torch.where(t.source >= 0, slot, -1))
        return note_restore(t, out, share.transpose(1, 2)) if self.restore == "soft" else out

    def macs(self, n: int, prefix: int, step: Step, dims: Dims) -> int:
        width = dims.width if self.metric == "feature" else dims.head_dim
        return n * n * width + step.keep * n * (width + dims.width)
