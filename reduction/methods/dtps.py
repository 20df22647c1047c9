"""dTPS: learned predictors choose tokens, and the others are squeezed into them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from reduction.assignment import Merge
from reduction.checks import one_of, positive
from reduction.counts import Dims, Step
from reduction.functional.squeezing import squeeze, squeeze_masked
from reduction.methods.dynamicvit import DynamicViT
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
        class_weight: Factor of the classification loss.

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
    drops = False  # they are absorbed

    def __init__(
        self,
        ratio_weight: float = 2.0,
        logit_weight: float = 0.5,
        token_weight: float = 0.5,
        ratios: list[float] | None = None,
        token_loss: str = "kl",
        temperature: float = 1.0,
        class_weight: float = 1.0,
    ) -> None:
        super().__init__(ratio_weight, logit_weight, token_weight, ratios, class_weight)
        self.token_loss = one_of("token_loss", token_loss, TOKEN_LOSSES)
        self.temperature = positive("temperature", temperature)

    def order(self, t: Tokens, score: Tensor, step: Step) -> Tensor:
        return score.argsort(dim=1, descending=True)

    def settle(self, t: Tokens, kept: Tensor, rest: Tensor, score: Tensor, step: Step) -> Merge:
        return squeeze(t, kept, rest, self.temperature)

    def mask(self, t: Tokens, s: Signals, step: Step) -> Tokens:
        """Mask tokens, and squeeze those that this step masks into the others."""
        after = super().mask(t, s, step)
        assert t.policy is not None and after.policy is not None
        p = t.prefix
        kept = after.policy[:, p:]
        gone = (1 - kept) * t.policy[:, p:]
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
