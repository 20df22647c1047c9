"""Cropr: routers that learn from small auxiliary heads, and a last layer that sees all tokens."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reduction.assignment import Keep, apply
from reduction.base import Card, Reducer
from reduction.checks import boolean, count, share
from reduction.counts import Dims, Spec, Step
from reduction.errors import ZooError
from reduction.mixins.learned import Staged
from reduction.mixins.parking import in_place, park, parked, unpark
from reduction.mixins.training import Outcome, Trains
from reduction.registry import register
from reduction.tokens import Signals, Tokens


def _mlp(width: int, hidden: int) -> nn.Sequential:
    layers = [("fc1", nn.Linear(width, hidden)), ("act", nn.GELU())]
    return nn.Sequential(OrderedDict([*layers, ("fc2", nn.Linear(hidden, width))]))


class CrossAttention(nn.Module):
    """Learned queries that attend to the tokens: the router, and in training its aggregate.

    Args:
        width: C.
        queries: M.
        heads: Heads of the aggregation; they make no difference to the scores.
        pre_norm: Normalise tokens first.
        q_proj: Project the queries.
        k_proj: Project keys.
        v_proj: Project values.
        mlp: Add an MLP of what was gathered to it.
        mlp_ratio: Its hidden width, in C.
    """

    def __init__(
        self,
        width: int,
        queries: int,
        heads: int,
        pre_norm: bool,
        q_proj: bool,
        k_proj: bool,
        v_proj: bool,
        mlp: bool,
        mlp_ratio: float,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.queries = nn.Parameter(torch.empty(1, queries, width))
        nn.init.trunc_normal_(self.queries, std=width**-0.5)
        self.attn_norm = nn.LayerNorm(width, eps=1e-6) if pre_norm else None
        self.q_proj = nn.Linear(width, width) if q_proj else None
        self.k_proj = nn.Linear(width, width) if k_proj else None
        self.v_proj = nn.Linear(width, width) if v_proj else None
        self.proj = nn.Linear(width, width) if heads > 1 else None
        self.mlp_norm = nn.LayerNorm(width, eps=1e-6) if mlp else None
        self.mlp = _mlp(width, int(width * mlp_ratio)) if mlp else None

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        """Take official weights, too, which call the projections `q`, `k` and `v`."""
        for name in ("q", "k", "v"):
            own = getattr(self, f"{name}_proj")
            for part in ("weight", "bias"):
                value = state.pop(f"{prefix}{name}.{part}", None)
                if value is not None:
                    state[f"{prefix}{name}_proj.{part}"] = value
            if own is not None and f"{prefix}{name}_proj.weight" in state:
                # The official ones may do without a bias.
                bias = f"{prefix}{name}_proj.bias"
                state.setdefault(bias, torch.zeros_like(own.bias))
        super()._load_from_state_dict(state, prefix, *args)

    def direction(self) -> Tensor:
        """The vector `(C,)` whose product with a token is its score, up to a constant.

        All projections are folded into it: queries and heads are summed over anyway.
        """
        total = self.queries[0]
        if self.q_proj is not None:
            weight, bias = self.q_proj.weight, self.q_proj.bias
            total = (total.unsqueeze(1) * weight).sum(-1) + bias
        total = total.sum(0)
        if self.k_proj is not None:
            total = (total.unsqueeze(1) * self.k_proj.weight).sum(0)
        return total

    @torch.no_grad()
    def score(self, x: Tensor) -> Tensor:
        """Scores `(B, N)` of tokens `(B, N, C)`; the order is what counts."""
        x = x if self.attn_norm is None else self.attn_norm(x)
        return (x @ self.direction().to(x.dtype).unsqueeze(1)).squeeze(-1)

    def forward(self, x: Tensor) -> Tensor:
        """What the queries gather from tokens `(B, N, C)`: `(B, M, C)`."""
        x = x if self.attn_norm is None else self.attn_norm(x)
        q = self.queries if self.q_proj is None else self.q_proj(self.queries)
        k = x if self.k_proj is None else self.k_proj(x)
        v = x if self.v_proj is None else self.v_proj(x)
        q, k, v = (y.unflatten(2, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))
        q = q.expand(x.shape[0], -1, -1, -1).to(k.dtype)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        y = y if self.proj is None else self.proj(y)
        if self.mlp is not None and self.mlp_norm is not None:
            y = y + self.mlp(self.mlp_norm(y))
        return y


class Module(nn.Module):
    """A router and the head that it learns from; only the queries matter after training."""

    def __init__(self, cross_attn: CrossAttention, width: int, classes: int) -> None:
        super().__init__()
        self.cross_attn = cross_attn
        self.head = nn.Sequential()
        self.reset(width, classes)

    def reset(self, width: int, classes: int) -> None:
        """Make the head for so many classes."""
        like = self.cross_attn.queries
        self.head = nn.Sequential()
        self.head.add_module("norm", nn.LayerNorm(width))
        self.head.add_module("head", nn.Linear(width, classes))
        self.head.to(like.device, like.dtype)


@register("cropr")
class Cropr(Staged, Trains, Reducer):
    """Keep the tokens that a learned query points at.

    After a block, a token's score is its product with the query (with several queries, with their
    sum). The best stay. With last-layer fusion the others are parked as they are and all come back,
    to their old places, before the last block, which runs on the full set.

    The query learns from an auxiliary task: in training it attends to the tokens of its block, and
    a small MLP and a linear head classify what it gathers. No gradient of that reaches the
    backbone, and none of the main loss the query. In evaluation nothing of this is computed.

    The paper's schedule drops R tokens after every block and one more after the first: with
    `llf` that is `constant_r` with r = [R+1, R, ..., R, 0, 0], without it [R+1, R, ..., R, 0].

    Args:
        llf: Last-layer fusion. Tokens are dropped after all blocks but the last two, and are all
            back for the last. Without it the last but one drops too, and tokens are lost.
        queries: Queries of each router; one for classification.
        heads: Heads of the aggregation in training.
        pre_norm: Normalise tokens before router and aggregation.
        q_proj: Project the queries.
        k_proj: Project keys.
        v_proj: Project values.
        mlp: MLP behind the aggregation.
        mlp_ratio: Its hidden width, in C.
        label_smoothing: Of the auxiliary cross-entropies; the recipe of the paper smooths all its
            losses by 0.1.

    Raises:
        ZooError: If `queries` or `heads` is below 1, or (when attached) the heads do not divide the
            width.

    References:
        Bergner et al., CVPR 2025, arXiv 2412.00965; official code github.com/benbergner/cropr
        (MIT).
    """

    card = Card(
        title="Token Cropr: Faster ViTs for Quite a Few Tasks",
        authors="Bergner et al.",
        venue="CVPR",
        year=2025,
        arxiv="2412.00965",
        code="https://github.com/benbergner/cropr",
        licence="MIT",
        kind="prune",
        training="queries by auxiliary heads, with the backbone",
        note="An untrained query keeps arbitrary tokens.",
    )
    site = "post"
    family = "constant_r"
    added_tokens = "spare"

    def __init__(
        self,
        llf: bool = True,
        queries: int = 1,
        heads: int = 1,
        pre_norm: bool = False,
        q_proj: bool = False,
        k_proj: bool = False,
        v_proj: bool = False,
        mlp: bool = True,
        mlp_ratio: float = 4.0,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        self.llf = boolean("llf", llf)
        self.queries = count("queries", queries)
        self.heads = count("heads", heads)
        self.pre_norm = boolean("pre_norm", pre_norm)
        self.q_proj = boolean("q_proj", q_proj)
        self.k_proj = boolean("k_proj", k_proj)
        self.v_proj = boolean("v_proj", v_proj)
        self.mlp = boolean("mlp", mlp)
        self.mlp_ratio = share("mlp_ratio", mlp_ratio, zero=False, most=100)
        self.label_smoothing = share("label_smoothing", label_smoothing)
        # The block that brings tokens back needs a step whatever the schedule says about it.
        self.every_block = llf

    # ------------------------------------------------------------------ building

    def setup(self, spec: Spec) -> None:
        """Build a module for each block that drops tokens."""
        if spec.width % self.heads:
            raise ZooError(f"heads={self.heads} must divide the width {spec.width}")
        n = spec.grid[0] * spec.grid[1]
        steps: list[Step | None] = []
        for step in spec.steps:
            drops = step is not None and not self._restores(step) and step.keep < n
            steps.append(step if drops else None)
            n = step.keep if step is not None and drops else n
        super().setup(spec._replace(steps=tuple(steps)))

    def build(self, spec: Spec, step: Step) -> nn.Module:
        attention = CrossAttention(
            spec.width,
            self.queries,
            self.heads,
            self.pre_norm,
            self.q_proj,
            self.k_proj,
            self.v_proj,
            self.mlp,
            self.mlp_ratio,
        )
        return Module(attention, spec.width, spec.classes)

    def reset_classifier(self, num_classes: int) -> None:
        for stage in self.stages:
            width = cast(Module, stage).cross_attn.queries.shape[-1]
            cast(Module, stage).reset(width, num_classes)

    # ------------------------------------------------------------------ counting

    def acts(self, block: int, depth: int) -> bool:
        """Behind the last block nothing is gained; without fusion the one before may drop."""
        return block <= depth - 2

    def _restores(self, step: Step) -> bool:
        return self.llf and step.block == step.depth - 2

    def count(self, n: int, step: Step) -> int:
        """What the schedule keeps; with fusion all patches leave the last block but one."""
        return step.grid[0] * step.grid[1] if self._restores(step) else min(n, step.keep)

    def macs(self, n: int, prefix: int, step: Step, dims: Dims) -> int:
        return 0 if self._restores(step) or step.keep >= n else n * dims.width

    # ------------------------------------------------------------------ running

    def reduce(self, t: Tokens, s: Signals, step: Step) -> Tokens:
        """Drop or park tokens, or bring all of them back."""
        if self._restores(step):
            rows = parked(t)
            return unpark(t, in_place(t, rows)) if rows else t
        if step.keep >= t.n:
            return t
        stage = cast(Module, self.stage(step))
        score = stage.cross_attn.score(t.patches)
        if self.training and stage.head.head.out_features:  # type: ignore[union-attr]
            # The backbone must not learn from the auxiliary head.
            answer = stage.head(stage.cross_attn(t.x.detach()))
            name = f"aux.{self._blocks.index(step.block)}"
            t = t._replace(memory={**t.memory, name: answer})
        if not self.llf:
            return apply(t, Keep(score.topk(step.keep, dim=1, sorted=False).indices))
        order = score.argsort(dim=1, descending=True)
        kept, gone = order[:, : step.keep], order[:, step.keep :]
        return park(t, apply(t, Keep(kept)), kept, gone)

    def auxiliary_losses(self, outcome: Outcome) -> dict[str, Tensor]:
        answers = [v for k, v in outcome.final.memory.items() if k.startswith("aux.")]
        if not answers:
            return {}
        total = outcome.logits.new_zeros((), dtype=torch.float32)
        for answer in answers:
            targets = outcome.targets.repeat_interleave(answer.shape[1], dim=0)
            total = total + F.cross_entropy(
                answer.flatten(0, 1).float(), targets, label_smoothing=self.label_smoothing
            )
        return {"router": total}
