"""IPCV: few tokens go through the blocks, and the others follow their nearest ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from reduction.assignment import Keep, apply
from reduction.base import Card, Reducer
from reduction.checks import count
from reduction.counts import Dims, Step
from reduction.functional.neighbours import nearest_kept, rebuilt
from reduction.functional.portable import stable_order
from reduction.mixins.following import Follows
from reduction.mixins.parking import Parks, park, unpark
from reduction.registry import register
from reduction.tokens import Signals, Tokens

_OWN = "ipcv."


@register("ipcv")
class IPCV(Parks, Follows, Reducer):
    """Information-Preserving Compression: tokens leave the MLPs, and come back for attention.

    At the first step of the schedule, tokens are ranked by how far the block before has moved
    them. The first ones go on through the MLPs alone. A token that does not is rebuilt where it is
    wanted: as it was at that step, plus the mean change since then of the kept tokens that were
    nearest to it. For `stabilised` blocks the attention has all tokens, rebuilt; in later blocks
    the kept ones are alone; behind the last block all are there again.

    Args:
        stabilised: Blocks, from a step of the schedule on, whose attention has all tokens.
        neighbours: Kept tokens that one that was not kept follows.

    Raises:
        ZooError: If an argument is below 1.

    References:
        IPCV, arXiv 2512.18747; official code github.com/Perkzi/IPCV (Apache-2.0).
    """

    card = Card(
        title="IPCV: Information-Preserving Compression for MLLM Visual Encoders",
        authors="Chen et al.",
        venue="arXiv",
        year=2025,
        arxiv="2512.18747",
        code="https://github.com/Perkzi/IPCV",
        licence="Apache-2.0",
        kind="park + rebuild",
        training="none",
        note="Saves encoder work alone: all tokens are there again at the end.",
    )
    site = "mid"
    needs = frozenset({"x_in"})
    added_tokens = "refuse"
    parks = "block"

    def __init__(self, stabilised: int = 7, neighbours: int = 10) -> None:
        super().__init__()
        self.stabilised = count("stabilised", stabilised)
        self.neighbours = count("neighbours", neighbours)

    def acts(self, block: int, depth: int) -> bool:
        """Before the first block nothing has moved."""
        return block > 0

    def lasts(self, block: int, first: int) -> bool:
        return block < first + self.stabilised

    def listens(self, block: int, steps: Sequence[Step | None]) -> bool:
        stages = [i for i, step in enumerate(steps) if step is not None]
        return bool(stages) and block in (stages[0] - 1, stages[0])

    def observe(self, t: Tokens, s: Signals, block: int) -> Tokens:
        """Note what entered the block before the first step."""
        if f"{_OWN}order" in t.memory:
            return t
        entered = s.need("x_in")[:, t.prefix :]
        return t._replace(memory={**t.memory, f"{_OWN}before": entered})

    def reduce(self, t: Tokens, s: Signals, step: Step) -> Tokens:
        memory = dict(t.memory)
        if f"{_OWN}order" not in memory:
            now = s.need("x_in")[:, t.prefix :]
            before = memory.pop(f"{_OWN}before", torch.zeros_like(now))
            with torch.no_grad():
                exact = torch.promote_types(now.dtype, torch.float32)
                moved = torch.linalg.vector_norm(now - before, dim=-1, dtype=exact)
                memory[f"{_OWN}order"] = stable_order(moved, descending=True)
            memory[f"{_OWN}start"] = now
        if not step.again:
            order, start = memory[f"{_OWN}order"], memory[f"{_OWN}start"]
            places = order[:, : step.keep].sort(dim=1).values, order[:, step.keep :]
            near = nearest_kept(start, *places, self.neighbours)
            memory |= {f"{_OWN}chosen": places[0], f"{_OWN}rest": places[1], f"{_OWN}near": near}
        return park(t, apply(t._replace(memory=memory), Keep(memory[f"{_OWN}chosen"])))

    def restore(self, t: Tokens) -> Tokens:
        """All tokens in their places; those that were not kept are rebuilt."""
        chosen, rest = t.memory[f"{_OWN}chosen"], t.memory[f"{_OWN}rest"]
        start, near = t.memory[f"{_OWN}start"], t.memory[f"{_OWN}near"]
        return unpark(t, rebuilt(t.patches, start, chosen, rest, near))

    def macs(self, n: int, prefix: int, step: Step, dims: Dims) -> int:
        # Distances once; rebuilding adds up and multiplies nothing.
        return 0 if step.again else (n - step.keep) * step.keep * dims.width
