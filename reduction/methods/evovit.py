"""Evo-ViT: important tokens take the slow path, the others are summarised and updated fast."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reduction.base import Card
from reduction.checks import boolean, number, one_of, shares
from reduction.counts import Dims, Spec, Step
from reduction.errors import ZooError
from reduction.mixins.following import Follows
from reduction.mixins.learned import Learned
from reduction.mixins.parking import Parks, in_place, park, parked, unpark
from reduction.mixins.ranking import ScoreReducer
from reduction.mixins.training import Outcome, Trains
from reduction.registry import register
from reduction.tokens import Signals, Tokens, take_rows

MODES = ("stage", "layer")
FAST = ("update", "park")


def _classifier(width: int, classes: int) -> nn.Linear:
    head = nn.Linear(width, classes)
    nn.init.trunc_normal_(head.weight, std=0.02)
    nn.init.zeros_(head.bias)
    return head


@register("evovit")
class EvoViT(Learned, Trains, Follows, Parks, ScoreReducer):
    """Let the best tokens through the blocks and park the others, which come back later.

    A running score `g` follows the class token's attention, `g = (1 - a) g + a * attention`, of
    slow tokens only once some are parked. Where the schedule says so, the `keep` tokens with the
    highest score become slow; the others are parked. With `fast="update"` one token that stands
    for them, `sum_j g_j x_j / sum_j g_j`, runs along, and what the blocks add to it is added to
    every parked token when it comes back. All patches are there again behind the last block, in
    their places.

    Args:
        mode: "stage": slow tokens stay the same until the next step of the schedule; "layer": they
            are chosen anew in every block.
        fast: "update": the paper's fast path; "park": parked tokens come back unchanged and nothing
            stands for them, as in the released code for DeiT.
        tradeoff: `a`, in (0, 1]. One number counts from the first step on, and the attention just
            before it is the first score; a list has one entry per block.
        drop_last: Do not bring parked tokens back behind the last block.
        score_from: "class" (the paper's) or "column_mean" (attention received from all tokens;
            ours, for models without a class token).
        head_weight: Factor of the loss of a second classifier, on the class token, or on the mean
            of the patches where the model's own reads the class token; 0: no second classifier. At
            1 the sum is twice the paper's, half of each.
        score: Rank by another score: "class", "column", "norm", "random", "inverse" or "repshift";
            None is `score_from`. See `reduction.functional.scores`. What reads nothing of a block
            is not followed but taken at each step.
        seed: Of the score "random", see `random`.

    Raises:
        ZooError: If an argument is unknown or out of range.

    References:
        Xu et al., AAAI 2022, arXiv 2108.01390; official code github.com/YifanXu74/Evo-ViT
        (MIT).
    """

    card = Card(
        title="Evo-ViT: Slow-Fast Token Evolution for Dynamic Vision Transformer",
        authors="Xu et al.",
        venue="AAAI",
        year=2022,
        arxiv="2108.01390",
        code="https://github.com/YifanXu74/Evo-ViT",
        licence="MIT",
        kind="park + update",
        training="backbone, with a second classifier",
        note="Saves tokens inside the stages only: all of them are there again at the end.",
    )
    site = "pre"
    added_tokens = "spare"

    def __init__(
        self,
        mode: str = "stage",
        fast: str = "update",
        tradeoff: float | Sequence[float] = 0.5,
        drop_last: bool = False,
        score_from: str = "class",
        head_weight: float = 1.0,
        score: str | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(score_from, score, seed)
        self.mode = one_of("mode", mode, MODES)
        self.fast = one_of("fast", fast, FAST)
        self.tradeoff = shares("tradeoff", tradeoff)
        self.drop_last = boolean("drop_last", drop_last)
        self.head_weight = number("head_weight", head_weight, 0)
        self.parks: Literal["no", "stage", "block"] = "stage" if mode == "stage" else "block"
        self.norm: nn.Module | None = None
        self.head: nn.Module | None = None
        self._reads = "class"

    # ------------------------------------------------------------------ learned parts

    def setup(self, spec: Spec) -> None:
        """Build the second classifier, unless the one that is there fits."""
        if isinstance(self.tradeoff, list) and len(self.tradeoff) != spec.depth:
            raise ZooError(
                f"tradeoff has {len(self.tradeoff)} entries but the model {spec.depth} blocks"
            )
        self._reads = spec.reads
        # Without a class token there is nothing besides the patches to classify.
        if not self.head_weight or not spec.classes or not self.needs_class_token:
            self.norm = self.head = None
            return
        fits = isinstance(self.head, nn.Linear) and self.head.in_features == spec.width
        if not fits or self.head.out_features != spec.classes:  # type: ignore[union-attr]
            self.norm = nn.LayerNorm(spec.width, eps=1e-6)
            self.head = _classifier(spec.width, spec.classes)

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the second classifier too, if there is one."""
        if isinstance(self.head, nn.Linear):
            fresh = _classifier(self.head.in_features, num_classes)
            self.head = fresh.to(self.head.weight)

    def second_logits(self, t: Tokens) -> Tensor | None:
        """Logits `(B, classes)` of the second classifier, from tokens before the final norm."""
        if self.norm is None or self.head is None:
            return None
        x = t.x[:, 0] if self._reads == "patches" else t.patches.mean(1)
        logits: Tensor = self.head(self.norm(x))
        return logits

    def auxiliary_losses(self, outcome: Outcome) -> dict[str, Tensor]:
        logits = self.second_logits(outcome.trace[-1])
        if logits is None:
            return {}
        return {"second": self.head_weight * F.cross_entropy(logits, outcome.targets)}

    # ------------------------------------------------------------------ score

    def acts(self, block: int, depth: int) -> bool:
        """Before the first block there is no attention to choose by."""
        return block > 0

    def listens(self, block: int, steps: Sequence[Step | None]) -> bool:
        """From the last block before the first step, or earlier, to the block before the last."""
        stages = [i for i, step in enumerate(steps) if step is not None]
        if not stages:
            return False
        first = stages[0] - 1
        if isinstance(self.tradeoff, list):
            # Where the old score does not count, what was before it need not be known.
            first = max([0, *(i for i in range(first + 1) if self.tradeoff[i] == 1)])
        return first <= block < stages[-1]

    def observe(self, t: Tokens, s: Signals, block: int) -> Tokens:
        """Follow the attention, of those tokens that took part."""
        slow = t.memory.get("slow")
        seen = self.score_in(t, s, block)
        old = t.memory.get("score")
        count = (
            slow.shape[1] if slow is not None else seen.shape[1] if old is None else old.shape[1]
        )
        # Behind them are the token that stands for the others, and what plugins added.
        seen = seen[:, :count].float()
        share = self.tradeoff[block] if isinstance(self.tradeoff, list) else self.tradeoff
        if old is not None:
            seen = share * seen + (1 - share) * (old if slow is None else old.gather(1, slow))
        if slow is not None and old is not None:
            seen = old.scatter(1, slow, seen)
        return t._replace(memory={**t.memory, "score": seen})

    # ------------------------------------------------------------------ slow and fast

    def count(self, n: int, step: Step) -> int:
        """The slow tokens, and the one that stands for the others."""
        return min(n, step.keep + (self.fast == "update"))

    def reduce(self, t: Tokens, s: Signals, step: Step) -> Tokens:
        """Park all but the best tokens."""
        score = t.memory.get("score") if self.needs else None
        if score is None:
            score = self.score(t, s, step).float()
        score = score[:, : t.n]  # tokens that a plugin added before the first block stay aside
        order = score.argsort(dim=1, descending=True)
        slow, rest = order[:, : step.keep], order[:, step.keep :]
        memory = {**t.memory, "score": score, "slow": slow, "rest": rest}
        memory = dict(park(t, t._replace(memory=memory), slow, rest).memory)
        rows = [t.x[:, : t.prefix], take_rows(t.patches, slow)]
        sizes = [t.size[:, : t.prefix], take_rows(t.patch_size, slow)]
        origin = None if t.origin is None else take_rows(t.origin, slow)
        away = -1
        if self.fast == "update":
            weight, others = score.gather(1, rest), parked(t._replace(memory=memory))[0]
            weight = (weight / weight.sum(1, keepdim=True)).to(others.dtype)
            memory["rep"] = torch.bmm(weight.unsqueeze(1), others).to(t.x.dtype)
            rows.append(memory["rep"])
            sizes.append(take_rows(t.patch_size, rest).sum(1, keepdim=True))
            away = step.keep
            if origin is not None:
                origin = torch.cat([origin, origin.new_full((origin.shape[0], 1), -1)], dim=1)
        source = t.source
        if source is not None:
            slot = torch.full_like(order, away)
            places = torch.arange(step.keep, device=order.device).expand_as(slow)
            slot = slot.scatter(1, slow, places)
            source = torch.where(source >= 0, slot.gather(1, source.clamp_min(0)), -1)
        return t._replace(
            x=torch.cat(rows, dim=1),
            size=torch.cat(sizes, dim=1),
            unit=t.unit and self.fast == "park",
            origin=origin,
            source=source,
            memory=memory,
            grid=None,
        )

    def restores(self, block: int, depth: int) -> bool:
        return not (self.drop_last and block == depth - 1)

    def restore(self, t: Tokens) -> Tokens:
        """Put every patch back where it was."""
        memory = dict(t.memory)
        del memory["rest"]
        memory["chosen"] = memory.pop("slow")  # for those who want to see the last choice
        count, rows = memory["chosen"].shape[1], parked(t)
        if "rep" in memory:
            rows = [rows[0] + (t.patches[:, count : count + 1] - memory.pop("rep"))]
        t = t._replace(unit=True, memory=memory)
        return unpark(t, in_place(t, rows), count + int(self.fast == "update"))

    def macs(self, n: int, prefix: int, step: Step, dims: Dims) -> int:
        # The token that stands for the others.
        return (n - step.keep) * dims.width if self.fast == "update" else 0
