"""dTPS: learned predictors choose tokens, and the others are squeezed into them."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from reduction.assignment import Merge, apply
from reduction.counts import Dims, Step
from reduction.errors import ZooError
from reduction.functional.squeezing import squeeze, squeeze_masked
from reduction.methods.dynamicvit import DynamicViT, Predictor
from reduction.methods.etps import ETPS
from reduction.registry import register
from reduction.tokens import Signals, Tokens

TOKEN_LOSSES = ("kl", "mse")


@register("dtps")
class DTPS(DynamicViT):
    """Keep the tokens that a learned predictor rates highest; each absorbs those most like it.

    Predictors, decisions and masks are those of DynamicViT. What is not kept joins the kept token
    with the highest cosine c: a kept token becomes `(e x_j + sum exp(c_i) x_i) / (e + sum
    exp(c_i))`. In training all tokens stay; those that a stage drops are absorbed with the weights
    `exp(c g) g` of their decision g, so that the predictor learns from what becomes of them.

    Args:
        ratio_weight: Factor of the ratio loss.
        logit_weight: Factor of the logit loss.
        token_weight: Factor of the token loss.
        ratios: Kept share of each stage that the ratio loss aims at; None: what the schedule keeps.
        token_loss: "kl" (between the softmax over channels of this model's tokens and of the dense
            model's) or "mse".
        temperature: Divides the cosines.

    Raises:
        ZooError: If `token_loss` is unknown or `temperature` not positive.

    References:
        Wei et al., CVPR 2023, arXiv 2304.10716; official code
        github.com/megvii-research/TPS-CVPR2023 (Apache-2.0).
    """

    card = replace(
        ETPS.card,
        training="predictors and backbone, with the dense model as teacher",
        note="An untrained predictor keeps arbitrary tokens.",
    )

    def __init__(
        self,
        ratio_weight: float = 2.0,
        logit_weight: float = 0.5,
        token_weight: float = 0.5,
        ratios: list[float] | None = None,
        token_loss: str = "kl",
        temperature: float = 1.0,
    ) -> None:
        super().__init__(ratio_weight, logit_weight, token_weight, ratios)
        if token_loss not in TOKEN_LOSSES:
            raise ZooError(f"token_loss must be one of {TOKEN_LOSSES}, got {token_loss!r}")
        if isinstance(temperature, bool) or not temperature > 0:
            raise ZooError(f"temperature must be positive, got {temperature!r}")
        self.token_loss = token_loss
        self.temperature = temperature

    def assign(self, t: Tokens, s: Signals, step: Step) -> Merge:  # type: ignore[override]
        context = t.memory.get("context")
        context = None if context is None else context[:, : t.n].to(t.x.dtype)
        score = cast(Predictor, self.stage(step))(t.patches, context)[..., 0]
        return squeeze(t, score, step.keep, self.temperature)

    def reduce(self, t: Tokens, s: Signals, step: Step) -> Tokens:
        """Remove and squeeze tokens, or mask and squeeze them while training."""
        if self.training:
            return self._squeeze_masked(t, super().reduce(t, s, step))
        chosen = self.assign(t, s, step)
        out = apply(t, chosen)
        context = t.memory.get("context")
        if context is None:
            return out
        # What is longer than the tokens here belongs to those that were left alone.
        context = torch.cat([context.gather(1, chosen.leader), context[:, t.n :]], dim=1)
        return out._replace(memory={**t.memory, "context": context})

    def _squeeze_masked(self, before: Tokens, after: Tokens) -> Tokens:
        assert before.policy is not None and after.policy is not None
        p = before.prefix
        kept = after.policy[:, p:]
        gone = (1 - kept) * before.policy[:, p:]
        patches = squeeze_masked(after.patches, kept, gone, self.temperature)
        return after._replace(x=torch.cat([after.x[:, :p], patches], dim=1))

    def token_gap(self, tokens: Tensor, dense: Tensor) -> Tensor:
        if self.token_loss == "mse":
            return super().token_gap(tokens, dense)
        ours, theirs = tokens.log_softmax(-1), dense.log_softmax(-1)
        return (theirs.exp() * (theirs - ours)).sum(-1)

    def macs(self, n: int, prefix: int, step: Step, dims: Dims) -> int:
        # The predictor, and the cosines of dropped with kept tokens.
        return super().macs(n, prefix, step, dims) + (n - step.keep) * step.keep * dims.width
