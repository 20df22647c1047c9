"""AdaViT: gates for tokens, heads, and the two halves of every block."""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from reduction.assignment import Keep, apply
from reduction.base import Card, Reducer
from reduction.checks import count, number, positive, share
from reduction.counts import Dims, Spec, Step
from reduction.functional import thresholds
from reduction.functional.attention import attention_bias
from reduction.mixins.adaptive import Adaptive
from reduction.mixins.attention import AttentionInput, AttentionOutput, OwnAttention
from reduction.mixins.gating import Gates, MlpGates
from reduction.mixins.learned import Learned
from reduction.mixins.parking import park, unpark
from reduction.mixins.training import Outcome, Trains
from reduction.registry import register
from reduction.tokens import Signals, Tokens

_OWN = "adavit."
_KINDS = ("heads", "layers", "tokens")


class Gate(nn.Module):
    """A linear gate that starts open.

    Args:
        width: C.
        outputs: Decisions.
    """

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.mlp_head = nn.Linear(width, outputs)
        nn.init.trunc_normal_(self.mlp_head.weight, std=0.01)
        nn.init.constant_(self.mlp_head.bias, 2.0)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of being on."""
        logits: Tensor = self.mlp_head(x)
        return logits


class Block(nn.Module):
    """The gates of one block, under their official names.

    Args:
        width: C.
        heads: H.
        whole: Also gates of heads and of the two halves.
    """

    def __init__(self, width: int, heads: int, whole: bool) -> None:
        super().__init__()
        self.attn = nn.ModuleDict({"token_select": Gate(width, 1)})
        if whole:
            self.head_select = Gate(width, heads)
            self.layer_select = Gate(width, 2)


class Decisions(NamedTuple):
    """What a block does for each image: ones and zeros, with a gradient in training.

    Attributes:
        heads: `(B, H)`.
        layers: Attention and MLP, `(B, 2)`.
        tokens: `(B, N)`.
    """

    heads: Tensor
    layers: Tensor
    tokens: Tensor


@register("adavit")
class AdaViT(Adaptive, Learned, Trains, Gates, OwnAttention, Reducer):
    """Adaptive Vision Transformer: every block decides which tokens, heads and halves take part.

    Tokens that a block leaves out neither attend nor are attended to in it, skip its MLP and are
    back behind it. A head that is off adds nothing, and its slice of the MLP's input is blank, too.
    Gates are linear: of tokens on the normalised input of the attention, of heads and halves on the
    class token.

    Args:
        keep_layers: Blocks at the beginning whose heads and halves are all on.
        token_threshold: Probability above which a token takes part.
        head_threshold: Likewise of heads.
        layer_threshold: Likewise of halves.
        temperature: Divides the noisy logits in training.
        usage: Shares of heads, halves and tokens that training aims at.
        usage_weight: Factor of the distance to them.

    Raises:
        ZooError: If an argument is out of range.

    References:
        Meng et al., CVPR 2022, arXiv 2111.15668; official code github.com/MengLcool/AdaViT (no
        licence; this implementation is written from a specification).
    """

    card = Card(
        title="AdaViT: Adaptive Vision Transformers for Efficient Image Recognition",
        authors="Meng et al.",
        venue="CVPR",
        year=2022,
        arxiv="2111.15668",
        code="https://github.com/MengLcool/AdaViT",
        licence="none",
        kind="gate",
        training="gates and backbone",
        note="Untrained gates are open. No count can say what it saves: reported costs are limits.",
    )
    site = "attn"
    every_block = True
    limited = False
    added_tokens = "refuse"
    family = "constant_r"

    def __init__(
        self,
        keep_layers: int = 1,
        token_threshold: float = 0.6,
        head_threshold: float = 0.5,
        layer_threshold: float = 0.5,
        temperature: float = 5.0,
        usage: float = 0.5,
        usage_weight: float = 2.0,
    ) -> None:
        super().__init__()
        self.keep_layers = count("keep_layers", keep_layers, 0)
        self.token_threshold = share("token_threshold", token_threshold)
        self.head_threshold = share("head_threshold", head_threshold)
        self.layer_threshold = share("layer_threshold", layer_threshold)
        self.temperature = positive("temperature", temperature)
        self.usage = share("usage", usage)
        self.usage_weight = number("usage_weight", usage_weight, 0)
        self.blocks = nn.ModuleList()
        self._sizes: tuple[int, ...] = ()

    @property
    def needs_class_token(self) -> bool:
        return True

    def setup(self, spec: Spec) -> None:
        """Build the gates, unless those that are there fit."""
        sizes = (spec.depth, spec.width, spec.heads, self.keep_layers)
        if sizes != self._sizes:
            self._sizes = sizes
            blocks = range(spec.depth)
            self.blocks = nn.ModuleList(
                Block(spec.width, spec.heads, i >= self.keep_layers) for i in blocks
            )

    def count(self, n: int, step: Step) -> int:
        """All are there behind every block; how many take part is up to the image."""
        return n

    # ------------------------------------------------------------------ decisions

    def decide(self, t: Tokens, x: Tensor, block: int) -> Decisions:
        """What a block does.

        Args:
            t: Tokens that enter it.
            x: The normalised input of its attention, `(B, P+N, C)`.
            block: Its index.
        """
        gates, cls = cast(Block, self.blocks[block]), t.x[:, 0]
        token = cast(Gate, gates.attn["token_select"])
        tokens = self._on(token(x[:, t.prefix :]).squeeze(-1), self.token_threshold)
        if block < self.keep_layers:
            all_heads = tokens.new_ones(cls.shape[0], self._sizes[2])
            return Decisions(all_heads, tokens.new_ones(cls.shape[0], 2), tokens)
        heads = self._on(gates.head_select(cls), self.head_threshold)
        return Decisions(heads, self._on(gates.layer_select(cls), self.layer_threshold), tokens)

    def _on(self, logits: Tensor, threshold: float) -> Tensor:
        """Ones where a gate is open. In training they are drawn, and a soft gate has the gradient.

        The difference of two Gumbel variables is a logistic one. What is drawn is whether it is
        more likely on than off; thresholds are of evaluation.
        """
        logits = logits.float()
        if not self.training:
            return (logits.sigmoid() > threshold).float()
        u = torch.rand_like(logits).clamp(1e-6, 1 - 1e-6)
        soft = ((logits + u.log() - (1 - u).log()) / self.temperature).sigmoid()
        return (soft > 0.5).float() - soft.detach() + soft

    # ------------------------------------------------------------------ one block

    def attend(self, a: AttentionInput, t: Tokens, step: Step | None) -> AttentionOutput | None:
        """Attention of the tokens and heads that take part."""
        if step is None:
            return None
        assert a.x is not None
        chosen = self.decide(t, a.x, step.block)
        memory = {**t.memory, **self._noted(t, chosen)}
        if self.training:
            out, tokens = self._masked(a, t, chosen), t
        else:
            out, tokens = self._selected(a, t, chosen)
        heads = chosen.heads[:, :, None, None].to(out.dtype)
        memory |= {k: v for k, v in tokens.memory.items() if k not in memory}
        return AttentionOutput(out * heads, Signals(), tokens._replace(memory=memory))

    def _noted(self, t: Tokens, chosen: Decisions) -> dict[str, Tensor]:
        """This block's decisions, and in training those of all blocks so far."""
        found = {f"{_OWN}{kind}": value for kind, value in zip(_KINDS, chosen, strict=True)}
        for kind, value in zip(_KINDS, chosen, strict=True):
            name = f"{_OWN}all.{kind}"
            earlier = t.memory.get(name)
            share_ = value.mean(1).unsqueeze(0) if self.training else value.unsqueeze(0)
            found[name] = share_ if earlier is None else torch.cat([earlier, share_])
        return found

    def _masked(self, a: AttentionInput, t: Tokens, chosen: Decisions) -> Tensor:
        """All tokens, of which only those that take part are seen."""
        seen = chosen.tokens.detach() > 0.5
        mask = torch.cat([seen.new_ones(seen.shape[0], t.prefix), seen], dim=1)
        return a.plus(attention_bias(None, mask, a.q.dtype))._replace(need=frozenset()).usual()[0]

    def _selected(self, a: AttentionInput, t: Tokens, chosen: Decisions) -> tuple[Tensor, Tokens]:
        """Rows of those that take part alone; the others are put aside."""
        kept = chosen.tokens > 0.5
        index = torch.arange(t.n, device=kept.device).expand_as(kept)
        keep = thresholds.packed(index, kept, None, None, *thresholds.lengths(kept, None))
        assert isinstance(keep, Keep)
        valid = torch.ones_like(keep.index) if keep.valid is None else keep.valid.to(torch.int64)
        # Padding goes to a place of its own behind all others.
        places = torch.where(valid > 0, keep.index, t.n)
        tokens = park(t, apply(t, keep))
        tokens = tokens._replace(memory={**tokens.memory, f"{_OWN}places": places})
        head = torch.arange(t.prefix, device=kept.device).expand(kept.shape[0], -1)
        rows = torch.cat([head, keep.index + t.prefix], dim=1)
        taking = a.among(rows).plus(attention_bias(None, tokens.mask, a.q.dtype))
        return taking._replace(need=frozenset()).usual()[0], tokens

    def attention_gate(self, t: Tokens) -> Tensor:
        return self._branch(t, 0)

    def mlp_gates(self, t: Tokens) -> MlpGates:
        heads = t.memory[f"{_OWN}heads"]
        width = t.x.shape[2] // heads.shape[1]
        features = heads.repeat_interleave(width, dim=1).unsqueeze(1)
        return MlpGates(features, self._branch(t, 1))

    def _branch(self, t: Tokens, half: int) -> Tensor:
        on = t.memory[f"{_OWN}layers"][:, half, None, None]
        if not self.training:
            return on
        tokens = t.memory[f"{_OWN}tokens"]
        whole = torch.cat([tokens.new_ones(tokens.shape[0], t.prefix), tokens], dim=1)
        return on * whole.unsqueeze(-1)

    def ungate(self, t: Tokens) -> Tokens:
        memory = {k: v for k, v in t.memory.items() if not k.startswith(_OWN) or ".all." in k}
        places = t.memory.get(f"{_OWN}places")
        if places is None:
            return t._replace(memory=memory)
        before = t.memory["bank.rows.0"]
        spare = torch.cat([before, before.new_zeros(before.shape[0], 1, before.shape[2])], dim=1)
        index = places.unsqueeze(-1).expand(-1, -1, before.shape[2])
        patches = spare.scatter(1, index, t.patches)[:, :-1]
        return unpark(t._replace(memory=memory, mask=None), patches)._replace(unit=True)

    # ------------------------------------------------------------------ losses and costs

    def auxiliary_losses(self, outcome: Outcome) -> dict[str, Tensor]:
        memory, weight = outcome.final.memory, self.usage_weight
        used = {kind: memory[f"{_OWN}all.{kind}"] for kind in _KINDS}
        later = {kind: used[kind][self.keep_layers :] for kind in ("heads", "layers")}
        losses = {
            kind: weight * (value.mean() - self.usage).abs()
            for kind, value in later.items()
            if value.numel()
        }
        return losses | {"tokens": weight * (used["tokens"].mean() - self.usage).square()}

    def macs(self, n: int, prefix: int, step: Step, dims: Dims) -> int:
        gated = dims.heads + 2 if step.block >= self.keep_layers else 0
        return (n + gated) * dims.width
