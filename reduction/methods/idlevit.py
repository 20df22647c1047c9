"""IdleViT: in every block some tokens idle; all of them stay."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from reduction.assignment import Keep, apply
from reduction.base import Card, Reducer
from reduction.checks import boolean, number
from reduction.counts import Dims, Step
from reduction.mixins.attention import AttentionInput, AttentionOutput, OwnAttention
from reduction.mixins.parking import Parks, in_place, park, parked, unpark
from reduction.mixins.training import Outcome, Trains
from reduction.registry import register
from reduction.tokens import Signals, Tokens

_CUT = "cut"


def cut_losses(logits: Tensor, chosen: Tensor, prefix: int) -> Tensor:
    """How much attention crosses between working and idle tokens, and what is missing inside.

    Returns both, `(2,)`.

    Args:
        logits: Scaled products `(B, H, P+N, P+N)`.
        chosen: Tokens that work, `(B, K)`.
        prefix: P; these always work.
    """
    weight = logits.float().mean(1).softmax(-1)
    works = weight.new_zeros(weight.shape[0], weight.shape[2] - prefix).scatter(1, chosen, 1.0)
    m = torch.cat([works.new_ones(works.shape[0], prefix), works], dim=1)
    other = (m.unsqueeze(2) - m.unsqueeze(1)).abs() * weight
    between = other[:, :, prefix:].sum(-1).square().mean()
    within = ((weight @ m.unsqueeze(2)).squeeze(2) * m - m).square().mean()
    return torch.stack([between, within])


@register("idlevit")
class IdleViT(OwnAttention, Parks, Trains, Reducer):
    """Dynamic token idling.

    In every block from the first step of the schedule on, the tokens that the class token would
    look at most in this very block (`q_class . k`, mean over heads) go through attention and MLP,
    as queries and as keys. All others pass unchanged, and the next block chooses anew among all.
    Behind every block all tokens are there, in their places.

    Args:
        cut_weight: Factor of the token cut loss: attention between working and idle tokens, and
            what is missing of it inside.
        distill_weight: Factor of the distillation from the dense model: the divergence of the
            logits, and a hundred times the squared distance of the normalised class tokens.
        compat_every_second: Add up the cut loss of every second block only but divide by all of
            them, as the official code, which deletes from the list that it goes through.

    Raises:
        ZooError: If a factor is negative.

    References:
        Xu et al., AJCAI 2023, arXiv 2310.05654; official code github.com/Ackesnal/IdleViT (MIT).
    """

    card = Card(
        title="No Token Left Behind: Efficient Vision Transformer via Dynamic Token Idling",
        authors="Xu et al.",
        venue="AJCAI",
        year=2023,
        arxiv="2310.05654",
        code="https://github.com/Ackesnal/IdleViT",
        licence="MIT",
        kind="idle",
        training="fine-tuning recommended, with a token cut loss",
        note="Nothing is removed: tokens rest for a block and are all there at the end.",
    )
    site = "attn"
    added_tokens = "refuse"
    parks = "block"

    def __init__(
        self,
        cut_weight: float = 20.0,
        distill_weight: float = 5.0,
        compat_every_second: bool = False,
    ) -> None:
        super().__init__()
        self.cut_weight = number("cut_weight", cut_weight, 0)
        self.distill_weight = number("distill_weight", distill_weight, 0)
        self.compat_every_second = boolean("compat_every_second", compat_every_second)
        self.needs_teacher = distill_weight > 0

    @property
    def needs_class_token(self) -> bool:
        return True

    def attend(self, a: AttentionInput, t: Tokens, step: Step | None) -> AttentionOutput | None:
        """Attention of the working tokens alone; the others are put aside."""
        if step is None:
            return None
        with torch.no_grad():
            score = (a.q[:, :, : a.class_tokens] @ a.k.transpose(-2, -1)).mean((1, 2))
            score = score[:, t.prefix :]
            chosen = score.topk(step.keep, dim=1).indices.sort(dim=1).values
            idle = torch.ones_like(score).scatter(1, chosen, 0.0)
            rest = idle.topk(t.n - step.keep, dim=1).indices.sort(dim=1).values
        kept = park(t, apply(t, Keep(chosen)), chosen, rest)
        memory = {**kept.memory, "chosen": chosen}
        if self.training and self.cut_weight:
            found = cut_losses(a.logits(), chosen, t.prefix).unsqueeze(0)
            earlier = memory.get(_CUT)
            memory[_CUT] = found if earlier is None else torch.cat([earlier, found])
        head = torch.arange(t.prefix, device=chosen.device).expand(chosen.shape[0], -1)
        rows = torch.cat([head, chosen + t.prefix], dim=1)
        out, _ = a.among(rows)._replace(need=frozenset()).usual()
        return AttentionOutput(out, Signals(), kept._replace(memory=memory))

    def attention_macs(self, n: int, kept: int, width: int) -> int:
        return 2 * kept * kept * width

    def macs(self, n: int, prefix: int, step: Step, dims: Dims) -> int:
        # Of the query of what acts as the class token with all keys.
        return dims.class_tokens * (n + prefix) * dims.heads * dims.head_dim

    def restore(self, t: Tokens) -> Tokens:
        """Idle tokens come back where they were."""
        return unpark(t, in_place(t, parked(t)))

    def auxiliary_losses(self, outcome: Outcome) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = {}
        cut = outcome.final.memory.get(_CUT)
        if cut is not None:
            counted = cut[::2] if self.compat_every_second else cut
            losses["cut"] = self.cut_weight * counted.sum() / cut.shape[0]
        if outcome.teacher is None or not self.distill_weight:
            return losses
        logits = F.kl_div(
            outcome.logits.log_softmax(-1),
            outcome.teacher.logits.log_softmax(-1),
            reduction="batchmean",
            log_target=True,
        )
        ours, theirs = (F.normalize(t.x[:, 0], dim=-1) for t in _finals(outcome))
        return losses | {
            "logits": self.distill_weight * logits,
            "class": 100 * self.distill_weight * F.mse_loss(ours, theirs),
        }


def _finals(outcome: Outcome) -> tuple[Tokens, Tokens]:
    assert outcome.teacher is not None
    return outcome.final, outcome.teacher.final
