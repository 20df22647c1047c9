"""EVS: of a stack of frames, keep the tokens that have changed most since the frame before."""

from __future__ import annotations

import torch
from torch import Tensor

from reduction.base import Card
from reduction.checks import count
from reduction.counts import Step
from reduction.functional.frames import dissimilarity
from reduction.functional.portable import stable_order
from reduction.methods.rlt import frame_grid
from reduction.mixins.ranking import ScoreReducer
from reduction.registry import register
from reduction.tokens import Signals, Tokens

#: How much the first frame, or what has no token before it, counts as changed.
NEW = 255.0


@register("evs")
class EVS(ScoreReducer):
    """Efficient Video Sampling, for frames that lie on top of each other in one tall image.

    Behind a block, tokens are ranked by one minus the cosine with the token at their place in the
    frame before; those of the first frame always stay first. In serving engines this happens once,
    behind the tower: `schedule.blocks=[last]`. After an earlier step, a token whose place is empty
    in the frame before counts as new (ours), as does the stacking.

    How many an engine keeps of a share q removed says `reduction.functional.frames.evs_count`.

    Args:
        frames: How many lie on top of each other; with 1 all tokens count as new, and the first
            ones stay.

    Raises:
        ZooError: If `frames` is below 1.

    References:
        As in vLLM, github.com/vllm-project/vllm, `vllm/multimodal/evs.py` (Apache-2.0).
    """

    card = Card(
        title="Efficient Video Sampling",
        authors="NVIDIA, vLLM",
        venue="vLLM",
        year=2025,
        arxiv=None,
        code="https://github.com/vllm-project/vllm",
        licence="Apache-2.0",
        kind="prune",
        training="none",
        note="For stacks of frames; of one image the first tokens stay, whatever they are.",
    )
    site = "post"
    needs = frozenset({"origin"})
    drops = True
    added_tokens = "spare"

    def __init__(self, frames: int = 1) -> None:
        super().__init__()
        self.frames = count("frames", frames)

    def max_drop(self, n: int) -> int:
        return n - 1

    def score(self, t: Tokens, s: Signals, step: Step) -> Tensor:
        rows, columns = frame_grid(step.grid, self.frames)
        places = rows * columns
        if t.n == places:
            x = t.patches.detach().unflatten(1, (self.frames, places // self.frames))  # type: ignore[no-untyped-call]
            return dissimilarity(x).flatten(1)
        return self._sparse(t, places)

    def _sparse(self, t: Tokens, places: int) -> Tensor:
        """Of tokens that are no longer all there: each by its own place."""
        assert t.origin is not None
        x = t.patches.detach()
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        at = t.origin.clamp_min(0)
        index = at.unsqueeze(-1).expand(-1, -1, x.shape[2])
        whole = x.new_zeros(x.shape[0], places, x.shape[2]).scatter(1, index, x)
        there = torch.zeros_like(whole[..., 0]).scatter(1, at, 1.0)
        shape = (self.frames, places // self.frames)
        change = dissimilarity(whole.view(x.shape[0], *shape, -1)).flatten(1)
        each = places // self.frames
        before = torch.cat([torch.zeros_like(there[:, :each]), there[:, : places - each]], dim=1)
        return torch.where(before > 0, change, NEW).gather(1, at)

    def order(self, t: Tokens, score: Tensor, step: Step) -> Tensor:
        return stable_order(score, descending=True)[:, : step.keep].sort(dim=1).values
