"""A-ViT: every token decides when it has computed enough."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from reduction.assignment import Keep, apply
from reduction.base import Card, Reducer
from reduction.checks import number, one_of, positive, share
from reduction.counts import Spec, Step
from reduction.functional.portable import sigmoid, stable_order
from reduction.mixins.adaptive import Adaptive
from reduction.mixins.answer import OwnAnswer
from reduction.mixins.learned import Learned
from reduction.mixins.training import Outcome, Trains
from reduction.registry import register
from reduction.tokens import Signals, Tokens

COMPAT = ("none", "official")


def prior_target(depth: int, centre: float, compat: str = "none", share: float = 0.98) -> Tensor:
    """Shares of the blocks in which tokens should halt: a normal density around `centre`.

    Args:
        depth: Number of blocks L.
        centre: Block with the largest share.
        compat: "none" lets the shares sum to one; "official" scales them so that those before the
            centre sum to `share`, and all of them to about 3.3.
        share: See `compat`.

    Returns:
        `(L,)`.
    """
    blocks = torch.arange(depth, dtype=torch.float64)
    density = torch.exp(-0.5 * (blocks - centre) ** 2)
    if compat == "none":
        return (density / density.sum()).float()
    return (density * share / density[: int(centre)].sum()).float()


def prior_divergence(halting: Tensor, target: Tensor) -> Tensor:
    """How far the halting of the blocks is from the target: `mean t (log t - log h)`.

    Args:
        halting: Mean halting probability of each block, `(L,)`.
        target: `(L,)`.
    """
    share = (halting / halting.sum()).clamp(0.01, 0.99)
    target = target.to(share)
    return (torch.xlogy(target, target) - target * share.log()).mean()


@register("avit")
class AViT(Adaptive, Learned, OwnAnswer, Trains, Reducer):
    """Let tokens halt one by one: a token adds up probabilities and leaves when they reach one.

    Behind each block `p = sigmoid(scale * z_0 - center)`, with z_0 the first channel of the token:
    no parameter is added. A token whose sum exceeds `1 - eps` leaves; in the last block all do.
    The answer is the mean of a token's states, weighted by p, and by what is missing to one in its
    last block. Prefix tokens halt too: they are no longer seen, but keep their places.

    Counts depend on the image: batches are padded with masked tokens, a single image is not, and
    no image depends on the others. The schedule is an upper limit (ours): where more tokens are
    left, those closest to halting do so. Without a limit, `schedule=keep_rate schedule.rate=1`,
    only the tokens decide.

    Args:
        scale: Factor of the first channel.
        center: Offset; the larger, the later tokens halt. 30 and 75 belong to the official DeiT-T
            and DeiT-S weights.
        eps: A token halts above `1 - eps`.
        ponder_weight: Factor of the ponder loss, the mean number of blocks per token.
        prior_weight: Factor of the divergence of the blocks' halting from a normal prior.
        prior_depth: Block around which the prior wants tokens to halt; None: two thirds of the
            depth.
        compat: "official" computes the prior as the released code does: a target that does not sum
            to one, and means that leave the first image out and have the class token in.

    Raises:
        ZooError: If a value is out of range.

    References:
        Yin et al., CVPR 2022, arXiv 2112.07658; official code github.com/NVlabs/A-ViT (Apache-2.0;
        weights CC-BY-NC-SA-4.0).
    """

    card = Card(
        title="A-ViT: Adaptive Tokens for Efficient Vision Transformer",
        authors="Yin et al.",
        venue="CVPR",
        year=2022,
        arxiv="2112.07658",
        code="https://github.com/NVlabs/A-ViT",
        licence="Apache-2.0",
        kind="prune",
        training="backbone, whose first channel learns when to halt",
        note="Counts depend on the image; the schedule gives upper limits.",
    )
    site = "post"
    family = "constant_r"  # tokens halt little by little
    every_block = True
    added_tokens = "spare"
    by_token = frozenset({"sum", "left", "rows"})

    def __init__(
        self,
        scale: float = 10.0,
        center: float = 30.0,
        eps: float = 0.01,
        ponder_weight: float = 5e-4,
        prior_weight: float = 1e-3,
        prior_depth: float | None = None,
        compat: str = "none",
    ) -> None:
        super().__init__()
        self.scale = positive("scale", scale)
        self.center = number("center", center)
        self.eps = share("eps", eps, zero=False, one=False)
        self.ponder_weight = number("ponder_weight", ponder_weight, 0)
        self.prior_weight = number("prior_weight", prior_weight, 0)
        self.prior_depth = number("prior_depth", prior_depth, 1, null=True)
        self.compat = one_of("compat", compat, COMPAT)
        self._reads = "class"

    def setup(self, spec: Spec) -> None:
        self._reads = spec.reads

    # ------------------------------------------------------------------ halting

    def _begin(self, t: Tokens) -> dict[str, Tensor]:
        """Nobody has halted: sums, remainders, and which token of the start a row is."""
        zeros = torch.zeros_like(t.size)
        kind = torch.promote_types(t.x.dtype, torch.float32)
        rows = torch.arange(t.x.shape[1], device=t.x.device).expand(t.x.shape[0], -1)
        answer = t.x if self._reads == "patches" else t.x[:, : t.prefix]
        return {
            "sum": zeros,
            "left": zeros + 1,
            "rows": rows,
            "ponder": zeros,
            "blocks": zeros + 1,
            "answer": torch.zeros_like(answer, dtype=kind),
        }

    def reduce(self, t: Tokens, s: Signals, step: Step) -> Tokens:
        """Weigh this block's states, and remove the tokens that have halted."""
        memory = dict(t.memory) if "sum" in t.memory else {**t.memory, **self._begin(t)}
        last = step.block == step.depth - 1
        alive = torch.ones_like(t.size, dtype=torch.bool) if t.mask is None else t.mask
        raw = sigmoid(self.scale * t.x[..., 0].float() - self.center)
        p = torch.ones_like(raw) if last else raw
        total = memory["sum"] + p
        stop = alive & (total > 1 - self.eps)
        index, valid = self._stay(total.detach(), alive, stop, t.prefix, step.keep)
        if t.n > step.keep:
            # What the schedule has no room for halts too.
            over = torch.ones_like(alive).scatter(1, index + t.prefix, ~valid)
            over = torch.cat([stop[:, : t.prefix], over[:, t.prefix :]], dim=1)
            stop = stop | (alive & over)
        left = memory["left"]
        weight = torch.where(stop, left, p) * alive
        rows = memory["rows"]
        memory["ponder"] = memory["ponder"].scatter_add(1, rows, alive + left * stop)
        memory["blocks"] = memory["blocks"].scatter_add(1, rows, (alive & ~stop).to(t.size.dtype))
        memory["answer"] = self._answer(memory["answer"], rows, weight, t)
        if self.training:
            memory[f"halting.{step.block}"] = _sums(raw, alive, t.prefix)
        if last:
            # All have halted; what takes part in this block stays, for those who want features.
            valid = alive[:, t.prefix :].gather(1, index)
        memory["sum"], memory["left"] = total, left - p * alive
        if t.n > step.keep or not self._full(valid):
            longest = self._longest(valid)
            index, valid = index[:, :longest], valid[:, :longest]
            t = apply(t, Keep(index, valid))
            prefixes = torch.arange(t.prefix, device=rows.device).expand(rows.shape[0], -1)
            here = torch.cat([prefixes, index + t.prefix], dim=1)
            for name in ("rows", "sum", "left"):
                memory[name] = memory[name].gather(1, here)
        prefix = alive[:, : t.prefix] if last else (alive & ~stop)[:, : t.prefix]
        mask = torch.cat([prefix, valid], dim=1)
        return t._replace(mask=None if self._full(mask) else mask, memory=memory)

    def _stay(
        self, total: Tensor, alive: Tensor, stop: Tensor, prefix: int, keep: int
    ) -> tuple[Tensor, Tensor]:
        """Rows of the tokens that go on, first those farthest from halting, and which are real."""
        stays = (alive & ~stop)[:, prefix:]
        if prefix and self._reads == "class" and not self.training:
            # Once all prefix tokens have halted, nothing that the patches do can be seen.
            stays = stays & (alive & ~stop)[:, :prefix].any(1, keepdim=True)
        stopping = alive[:, prefix:] & ~stays
        key = torch.where(stays, total[:, prefix:], torch.inf)
        # Behind them those that stop here, which the last block still shows, then padding.
        key = torch.where(stopping, torch.finfo(key.dtype).max, key)
        index = stable_order(key)[:, :keep]
        return index, stays.gather(1, index)

    def _answer(self, answer: Tensor, rows: Tensor, weight: Tensor, t: Tokens) -> Tensor:
        """Add this block's share to every token's answer."""
        if self._reads == "class":
            count = t.prefix
            return answer + weight[:, :count, None].to(answer) * t.x[:, :count].to(answer.dtype)
        share = weight.unsqueeze(-1).to(answer) * t.x.to(answer.dtype)
        return answer.scatter_add(1, rows.unsqueeze(-1).expand_as(share), share)

    def _longest(self, valid: Tensor) -> int:
        """Rows to keep: those that some image needs. A compiled graph keeps the upper limit."""
        return valid.shape[1] if _symbolic(valid) else max(1, int(valid.sum(1).max()))

    def _full(self, mask: Tensor) -> bool:
        """Whether there is no padding, where that can be seen."""
        return not _symbolic(mask) and bool(mask.all())

    # ------------------------------------------------------------------ answer and losses

    def finish(self, t: Tokens) -> Tokens:
        """The answers of the prefix tokens take their places."""
        if "answer" not in t.memory:
            return t
        answer = t.memory["answer"][:, : t.prefix].to(t.x.dtype)
        return t._replace(x=torch.cat([answer, t.x[:, t.prefix :]], dim=1))

    def logits(self, backbone: nn.Module, t: Tokens) -> Tensor | None:
        """Classify the answers of all tokens where the head pools patches."""
        if self._reads == "class" or "answer" not in t.memory:
            return None
        model: Any = backbone
        logits: Tensor = model.forward_head(model.norm(t.memory["answer"].to(t.x.dtype)))
        return logits

    def halting(self, outcome: Outcome) -> Tensor:
        """Mean halting probability of each block over the tokens alive there, `(L,)`."""
        memory = outcome.final.memory
        sums = torch.stack([memory[f"halting.{i}"] for i in range(len(outcome.trace))])
        if self.compat == "official":
            some = sums[:, 1:] if sums.shape[1] > 1 else sums
            added, count = some[..., 0] + some[..., 2], some[..., 1] + some[..., 3]
        else:
            added, count = sums[..., 2], sums[..., 3]
        return added.sum(1) / count.sum(1).clamp_min(1)

    def auxiliary_losses(self, outcome: Outcome) -> dict[str, Tensor]:
        depth = len(outcome.trace)
        centre = self.prior_depth if self.prior_depth is not None else 2 * depth / 3
        halting = self.halting(outcome)
        target = prior_target(depth, centre, self.compat).to(halting.device)
        return {
            "ponder": self.ponder_weight * outcome.final.memory["ponder"].mean(),
            "prior": self.prior_weight * prior_divergence(halting, target),
        }


def _sums(p: Tensor, alive: Tensor, prefix: int) -> Tensor:
    """Sum and number of halting probabilities, of prefix tokens and of patches, `(B, 4)`."""
    p = p * alive
    parts = [p[:, :prefix].sum(1), alive[:, :prefix].sum(1), p[:, prefix:].sum(1)]
    return torch.stack([*(part.to(p.dtype) for part in parts), alive[:, prefix:].sum(1).to(p)], 1)


def _symbolic(x: Tensor) -> bool:
    """Whether values of tensors cannot be looked at."""
    tracing = torch.jit.is_tracing()  # type: ignore[no-untyped-call]
    return bool(x.device.type == "meta" or torch.compiler.is_compiling() or tracing)
