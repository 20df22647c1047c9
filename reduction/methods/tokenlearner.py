"""TokenLearner: a few tokens, each a learned spatial map over the patches."""

from __future__ import annotations

from typing import Literal, cast

import torch
from torch import Tensor, nn

from reduction.assignment import Mix, apply
from reduction.base import Card, Reducer
from reduction.checks import boolean, count, one_of
from reduction.counts import Dims, Spec, Step
from reduction.mixins.learned import Queries
from reduction.mixins.parking import Parks, park, parked, unpark
from reduction.registry import register
from reduction.tokens import Signals, Tokens

VERSIONS = ("1.0", "1.1")
POOLINGS = ("sum", "mean")


def _dense(inputs: int, outputs: int) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class MlpMaps(nn.Module):
    """Version 1.1: an MLP per patch and a softmax over the patches."""

    def __init__(self, width: int, outputs: int, bottleneck: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.fc1 = _dense(width, bottleneck)
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = _dense(bottleneck, outputs)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Maps `(B, M, N)` over patches `(B, N, C)`; each sums to one."""
        logits: Tensor = self.fc2(self.act(self.fc1(self.norm(x))))
        return logits.softmax(1).transpose(1, 2)


class ConvMaps(nn.Module):
    """Version 1.0: four convolutions on the patch grid and a sigmoid."""

    def __init__(self, width: int, outputs: int, mean: bool) -> None:
        super().__init__()
        self.mean = mean
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.act = nn.GELU(approximate="tanh")
        for i in range(4):
            conv = nn.Conv2d(outputs if i else width, outputs, 3, padding=1, bias=False)
            nn.init.trunc_normal_(conv.weight, std=conv.weight[0].numel() ** -0.5)
            self.add_module(f"conv{i}", conv)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Maps `(B, M, N)` over patches `(B, N, C)` in row-major order; they are not normalised."""
        y = self.norm(x).transpose(1, 2).unflatten(2, grid)
        for i in range(4):
            y = self.get_submodule(f"conv{i}")(self.act(y) if i else y)
        maps: Tensor = y.flatten(2).sigmoid()
        return maps / x.shape[1] if self.mean else maps


class Fuser(nn.Module):
    """Puts what a block made of the learned tokens back onto the patches.

    It starts as the identity: the mixing of the tokens starts at zero.
    """

    def __init__(self, width: int, tokens: int, bottleneck: int, norm: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6) if norm else nn.Identity()
        self.mix = nn.Linear(tokens, tokens)
        nn.init.zeros_(self.mix.weight)
        nn.init.zeros_(self.mix.bias)
        self.norm2 = nn.LayerNorm(width, eps=1e-6) if norm else nn.Identity()
        self.norm_in = nn.LayerNorm(width, eps=1e-6)
        self.fc1 = _dense(width, bottleneck)
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = _dense(bottleneck, tokens)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Patches `(B, N, C)` after adding tokens `(B, M, C)` to them."""
        y = self.mix(self.norm1(y).transpose(1, 2)).transpose(1, 2)
        gate = self.fc2(self.act(self.fc1(self.norm_in(x)))).sigmoid()
        return x + torch.bmm(gate, self.norm2(y).to(gate.dtype)).to(x.dtype)


class Learner(nn.Module):
    """The learned part of one block: maps, and perhaps a fuser."""

    def __init__(self, maps: MlpMaps | ConvMaps, fuser: Fuser | None, outputs: int) -> None:
        super().__init__()
        self.maps = maps
        self.fuser = fuser
        self.outputs = outputs


@register("tokenlearner")
class TokenLearner(Queries, Parks, Reducer):
    """Replace the patches by a few tokens, each a learned weighted sum of them.

    Before a block, `tokens = W x` with maps `W` of shape `(M, N)` that are computed from the
    normalised patches. Prefix tokens pass by. Without a fuser the rest of the network runs on the
    M tokens. With a fuser every block from there on learns tokens of its own, runs on them, and
    adds a gated mixture of its output to the patches, all of which are still there at the end.

    Args:
        version: "1.1" (an MLP per patch, softmax over patches; the release's default) or "1.0" (the
            paper's: four 3x3 convolutions, sigmoid). "1.0" needs the patch grid, so without a fuser
            only the first block that the schedule names learns tokens; the others do nothing.
        pooling: Of "1.0": "sum" (the release's; very large tokens) or "mean" over patches.
        fuser: Give the patches back after every block.
        bottleneck: Hidden width of the MLP of "1.1".
        fuser_bottleneck: Hidden width of the fuser's gate.
        fuser_norm: Normalise around the fuser's mixing of tokens.

    Raises:
        ZooError: If an argument is unknown or below 1.

    References:
        Ryoo et al., NeurIPS 2021, arXiv 2106.11297; official code
        github.com/google-research/scenic (Apache-2.0).
    """

    card = Card(
        title="TokenLearner: Adaptive Space-Time Tokenization for Videos",
        authors="Ryoo et al.",
        venue="NeurIPS",
        year=2021,
        arxiv="2106.11297",
        code="https://github.com/google-research/scenic",
        licence="Apache-2.0",
        kind="soft pooling",
        training="maps and fuser, with the backbone",
        note="The maps are learned: train before use. The release's models have no class token; "
        "here it passes by.",
    )
    site = "pre"

    def __init__(
        self,
        version: str | float = "1.1",
        pooling: str = "sum",
        fuser: bool = False,
        bottleneck: int = 64,
        fuser_bottleneck: int = 64,
        fuser_norm: bool = True,
    ) -> None:
        super().__init__()
        # YAML reads 1.0 as a number.
        self.version = one_of("version", str(version), VERSIONS)
        self.pooling = one_of("pooling", pooling, POOLINGS)
        self.fuser = boolean("fuser", fuser)
        self.bottleneck = count("bottleneck", bottleneck)
        self.fuser_bottleneck = count("fuser_bottleneck", fuser_bottleneck)
        self.fuser_norm = boolean("fuser_norm", fuser_norm)
        self._last: int | None = None  # the block behind which nobody reads patches
        self.parks: Literal["no", "stage", "block"] = "block" if fuser else "no"
        # A fuser's patches and a convolution's grid know no tokens of a plugin.
        self.added_tokens: Literal["reduce", "spare", "refuse"] = "reduce"
        if fuser or self.version == "1.0":
            self.added_tokens = "refuse" if fuser else "spare"

    # ------------------------------------------------------------------ building

    def build(self, spec: Spec, step: Step) -> nn.Module:
        maps: MlpMaps | ConvMaps
        if self.version == "1.1":
            maps = MlpMaps(spec.width, step.keep, self.bottleneck)
        else:
            maps = ConvMaps(spec.width, step.keep, self.pooling == "mean")
        fuser = None
        if self.fuser:
            fuser = Fuser(spec.width, step.keep, self.fuser_bottleneck, self.fuser_norm)
        return Learner(maps, fuser, step.keep)

    def setup(self, spec: Spec) -> None:
        """Build what each block learns with; convolutions only where there is a grid."""
        if self.version == "1.0" and not self.fuser:
            first = spec.stages[0].block if spec.stages else None
            steps = (s if s is not None and s.block == first else None for s in spec.steps)
            spec = spec._replace(steps=tuple(steps))
        super().setup(spec)
        self._last = spec.depth - 1 if spec.reads == "class" else None

    def unused(self) -> set[str]:
        """The fuser of the last block, where the classifier reads the class token alone."""
        if self._last not in self._blocks:
            return set()
        prefix = f"stages.{self._blocks.index(self._last)}.fuser."
        return {name for name, _ in self.named_parameters() if name.startswith(prefix)}

    # ------------------------------------------------------------------ counting

    def _idle(self, n: int, step: Step) -> bool:
        """Convolutions have nothing to do on tokens that lie on no grid."""
        return self.version == "1.0" and n != step.grid[0] * step.grid[1]

    def count(self, n: int, step: Step) -> int:
        """Outputs of the block's maps."""
        return n if self._idle(n, step) else super().count(n, step)

    def macs(self, n: int, prefix: int, step: Step, dims: Dims) -> int:
        m, c = self.count(n, step), dims.width
        if self._idle(n, step) or (self.fuser and m == n):
            return 0
        if self.version == "1.1":
            maps = n * (c * self.bottleneck + self.bottleneck * m)
        else:
            maps = n * 9 * (c * m + 3 * m * m)
        fuser = n * (c * self.fuser_bottleneck + self.fuser_bottleneck * m) + m * m * c + n * m * c
        return maps + n * m * c + (fuser if self.fuser else 0)

    # ------------------------------------------------------------------ running

    def assign(self, t: Tokens, s: Signals, step: Step) -> Mix:
        return Mix(cast(Learner, self.stage(step)).maps(t.patches, step.grid))

    def reduce(self, t: Tokens, s: Signals, step: Step) -> Tokens:
        """Learn tokens, and park the patches for the fuser."""
        if self._idle(t.n, step):
            return t
        stage = cast(Learner, self.stage(step))
        if self.fuser and stage.outputs == t.n:
            return t  # as many tokens as patches: nothing would be parked
        learned = apply(t, self.assign(t, s, step))
        if not self.fuser:
            return learned
        # Its length is the stage that learned: known through checkpointing, as no number would be.
        stage_mark = t.size.new_empty(self._blocks.index(step.block))
        return park(t, learned._replace(memory={**learned.memory, "stage": stage_mark}))

    def restore(self, t: Tokens) -> Tokens:
        """The patches, with what the block made of the learned tokens added."""
        memory = dict(t.memory)
        fuser = cast(Learner, self.stages[memory.pop("stage").shape[0]]).fuser
        assert fuser is not None
        patches = fuser(parked(t)[0], t.patches)
        return unpark(t._replace(memory=memory), patches)
