"""TCA: condense the middling tokens into a few centres and the rest into one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from reduction.assignment import Merge
from reduction.base import Card
from reduction.checks import count, one_of
from reduction.counts import Dims, Spec, Step
from reduction.errors import ZooError
from reduction.mixins.attention import ExtraKeys
from reduction.mixins.learned import Learned
from reduction.mixins.ranking import ScoreReducer
from reduction.registry import register
from reduction.tokens import Tokens, take_rows

COUNTINGS = ("total", "release")


@register("tca")
class TCA(Learned, ExtraKeys, ScoreReducer):
    """Token condensation: whole tokens, weighted centres, and one token of what is left.

    Between attention and MLP tokens are ranked by the class token's attention `s` (mean over
    heads). The best stay as they are. The next are grouped around a few of them: farthest-first
    centres in the residual stream, each member joining the nearest; a group becomes its mean with
    weights `1 / distance to the centre` (1 for the centre itself). The last become one token,
    `sum s_j x_j`, not normalised. `keep` counts the kept and the centres; the last token comes on
    top, as in EViT.

    This is the reduction of the paper's test-time adaptation. Its other half, a memory of class
    tokens that corrects the logits and makes the anchors, stands around an evaluation.

    Args:
        centers: Groups; fewer where fewer are asked for.
        counting: "total": `keep - centers` tokens stay whole, and what is left is shared two to one
            between the groups and the last token (ours, with the costs that the paper states).
            "release": with `m = n + 1 - keep`, `keep - 2 m` tokens stay whole and `2 m` are
            grouped, as in the released code; far fewer than `keep` tokens are left, and no more
            than about a third can be dropped at once.
        anchors: K > 0: in reducing blocks the anchor nearest to the class token, out of K for each
            block, takes part in the attention; see `set_anchors`.
        score_from: "class" (the paper's) or "column_mean" (attention received from all tokens;
            ours, for models without a class token).
        score: Rank by another score, see `ranked`; None is `score_from`.
        seed: Of the score "random", see `random`.

    Raises:
        ZooError: If an argument is out of range.

    References:
        Wang et al., ICCV 2025, arXiv 2410.14729; official code github.com/Jo-wang/TCA (no licence
        file; this implementation is written from a specification, not from that code).
    """

    card = Card(
        title="Is Less More? Exploring Token Condensation as Training-free Test-time Adaptation",
        authors="Wang et al.",
        venue="ICCV",
        year=2025,
        arxiv="2410.14729",
        code="https://github.com/Jo-wang/TCA",
        licence="none",
        kind="prune + merge + fuse",
        training="none",
        note="The released code cannot reach the published costs; by default tokens are counted so "
        "that they come out.",
    )
    site = "mid"
    no_thresholds = "its groups are so many by rule"

    def __init__(
        self,
        centers: int = 4,
        counting: str = "total",
        anchors: int = 0,
        score_from: str = "class",
        score: str | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(score_from, score, seed)
        self.centers = count("centers", centers)
        self.counting = one_of("counting", counting, COUNTINGS)
        self.anchors = count("anchors", anchors, 0)
        self.anchor_tokens: Tensor | None
        self.register_buffer("anchor_tokens", None)

    @property
    def needs_class_token(self) -> bool:
        return super().needs_class_token or self.anchors > 0

    # ------------------------------------------------------------------ anchors

    def setup(self, spec: Spec) -> None:
        """Make room for the anchors; until they are set they are zero."""
        shape = (self.anchors, spec.depth, spec.width)
        if self.anchors and (self.anchor_tokens is None or self.anchor_tokens.shape != shape):
            self.anchor_tokens = torch.zeros(shape)

    def set_anchors(self, tokens: Tensor) -> None:
        """Use these class tokens as anchors.

        Args:
            tokens: One row per anchor and block, `(K, depth, C)`: class tokens behind each block,
                in the paper the means over a few confident images of each class.

        Raises:
            ZooError: If the shape is not that of the model.
        """
        if self.anchor_tokens is None or self.anchor_tokens.shape != tokens.shape:
            have = None if self.anchor_tokens is None else tuple(self.anchor_tokens.shape)
            raise ZooError(
                f"expected anchors of shape {have} (reducer.anchors, depth, width), got "
                f"{tuple(tokens.shape)}"
            )
        self.anchor_tokens.copy_(tokens)

    def _anchored(self, step: Step) -> bool:
        # In front of block 0 there is no class token yet; the release takes those of the last.
        return self.anchors > 0 and (step.block > 0 or self.counting == "release")

    def inside(self, t: Tokens) -> bool:
        return self.anchors > 0

    def extra_keys(self, t: Tokens, step: Step) -> Tensor | None:
        """The anchor `(B, 1, C)`: of those behind the previous block the nearest by cosine."""
        if not self._anchored(step):
            return None
        assert self.anchor_tokens is not None
        anchors = self.anchor_tokens[:, step.block - 1].to(t.x.dtype)
        # Elementwise, because it is no product that counts.
        near = F.normalize(anchors, dim=-1) * F.normalize(t.x[:, :1].detach(), dim=-1)
        return anchors[near.sum(-1).argmax(1)].unsqueeze(1)

    # ------------------------------------------------------------------ counting

    def _shares(self, n: int, keep: int) -> tuple[int, int, int]:
        """Tokens that stay whole, that are grouped, and groups."""
        if self.counting == "release":
            m = n + 1 - keep
            return keep - 2 * m, 2 * m, min(self.centers, 2 * m)
        groups = min(self.centers, keep)
        rest = n - keep + groups
        last = min(max(1, rest // 3), n - keep)
        return keep - groups, rest - last, groups

    def max_drop(self, n: int) -> int:
        if self.counting == "release":
            return max(0, n - -(-2 * (n + 1) // 3))
        return n - 1

    def count(self, n: int, step: Step) -> int:
        if step.keep >= n:
            return n
        whole, _, groups = self._shares(n, step.keep)
        return whole + groups + 1

    def macs(self, n: int, prefix: int, step: Step, dims: Dims) -> int:
        if not self._anchored(step):
            return 0
        # One more row in the attention: its projections, its products, its place in the class row.
        inner = dims.heads * dims.head_dim
        pairs = 2 * (2 * (n + prefix) + 1)
        signal = 0
        if "cls_row" in self.needs:
            signal = dims.class_tokens
        elif "column" in self.needs:
            signal = 2 * (n + prefix) + 1
        return 4 * dims.width * inner + (pairs + signal) * inner

    # ------------------------------------------------------------------ running

    def first_center(self, score: Tensor, step: Step) -> Tensor:
        """Member `(B,)` that the first group starts from, of members `(B, m)` by falling score."""
        return torch.zeros_like(score[:, 0], dtype=torch.int64)

    def order(self, t: Tokens, score: Tensor, step: Step) -> Tensor:
        return score.argsort(dim=1, descending=True)

    def settle(self, t: Tokens, kept: Tensor, rest: Tensor, score: Tensor, step: Step) -> Merge:
        whole, members, groups = self._shares(t.n, step.keep)
        # Centres are among those that count as kept.
        order = torch.cat([kept, rest], dim=1)
        kept, body = order[:, :whole], order[:, whole : whole + members]
        last = order[:, whole + members :]
        slot_of, weight, leader = self._condense(t, body, score.detach(), groups, step)
        slots = [
            torch.arange(whole, device=order.device).expand_as(kept),
            slot_of + whole,
            torch.full_like(last, whole + groups),
        ]
        shares = [
            torch.ones_like(kept, dtype=weight.dtype),
            weight,
            score.gather(1, last).to(weight.dtype),
        ]
        slot = torch.zeros_like(order).scatter(1, order, torch.cat(slots, dim=1))
        coef = torch.zeros_like(order, dtype=weight.dtype)
        coef = coef.scatter(1, order, torch.cat(shares, dim=1))
        return Merge(slot, torch.cat([kept, leader, last[:, :1]], dim=1), coef=coef)

    @torch.no_grad()
    def _condense(
        self, t: Tokens, body: Tensor, score: Tensor, groups: int, step: Step
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Group of each member `(B, m)`, its share in it, and the members at the centres."""
        x = take_rows(t.patches, body).float()
        index = self.first_center(score.gather(1, body), step)
        centers, gaps = [], []
        for _ in range(groups):
            centers.append(index)
            gap = (x - take_rows(x, index.unsqueeze(1))).norm(dim=-1)
            gaps.append(gap)
            nearest = torch.stack(gaps, dim=-1).amin(-1)
            # A centre is never chosen twice, even among identical tokens.
            chosen = torch.stack(centers, dim=1)
            index = nearest.scatter(1, chosen, -1.0).argmax(1)
        distance, slot = torch.stack(gaps, dim=-1).min(-1)
        place = torch.arange(groups, device=slot.device).expand_as(chosen)
        # Nor does it join another one: no group is empty.
        slot = slot.scatter(1, chosen, place)
        weight = torch.where(distance == 0, 1.0, 1 / distance.clamp_min(1e-30))
        weight = weight.scatter(1, chosen, 1.0)
        total = weight.new_zeros(weight.shape[0], groups).scatter_add(1, slot, weight)
        return slot, weight / total.gather(1, slot), body.gather(1, chosen)
