"""Differentiable token counts and their cost: what DiffRate's search is made of.

Shapes: L blocks, K candidate counts, N reducible tokens at the start. Counts are of reducible
tokens: the paper's numbers are these plus the class token.

References:
    DiffRate, ICCV 2023, arXiv 2305.17997; official code github.com/OpenGVLab/DiffRate (no licence
    file; written from a specification, not from that code).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from reduction.errors import ZooError

# An expectation this little above an integer is rounding, not a fraction of a token.
_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4}


def straight_through(value: Tensor, *sources: Tensor) -> Tensor:
    """`value` forwards, bit by bit; backwards the gradient goes in full to every source.

    With one source this is the straight-through estimator (of a ceil, of a mask); with several it
    is DiffRate's minimum, which blames all that could have been smaller.

    Args:
        value: What comes out; no gradient flows into it.
        *sources: Tensors of the same shape.
    """
    value = value.detach()
    for source in sources:
        value = value + (source - source.detach())
    return value


def ceil_through(x: Tensor) -> Tensor:
    """Round up, with the identity as gradient."""
    return straight_through((x.detach() - _ROUNDING[x.dtype]).ceil(), x)


def straight_mask(keep_probability: Tensor, kept: int, last: int) -> Tensor:
    """0/1 mask of sorted tokens for going from `last` tokens to `kept`.

    Ranks from `last` on stay one: they are zero in the running mask already, and a zero here would
    cut the gradient of the block that masked them.

    Args:
        keep_probability: Probability that each rank is kept, `(N,)`.
        kept: Tokens that stay.
        last: Tokens that were left before.

    Returns:
        `(N,)`, exactly 0 or 1; the gradient goes to `keep_probability`.
    """
    hard = torch.ones_like(keep_probability)
    hard[kept:last] = 0.0
    return straight_through(hard, keep_probability)


class Cost(NamedTuple):
    """Multiply-accumulates of a model as a function of its token counts.

    With `n` tokens entering a block and `m` leaving it, prefix tokens included, the block costs
    `linear * n + pair * n**2 + mlp * m`.

    Attributes:
        fixed: What does not depend on counts: patch embedding, head, first tokens.
        prefix: Prefix tokens, which come on top of the reducible ones.
        linear: Per block: linear layers of the attention.
        pair: Per block: the two attention products.
        mlp: Per block: linear layers of the MLP.
    """

    fixed: float
    prefix: int
    linear: tuple[float, ...]
    pair: tuple[float, ...]
    mlp: tuple[float, ...]

    @classmethod
    def of_vit(
        cls, start: int, width: int, patch: int, depth: int, classes: int = 1000, ratio: float = 4
    ) -> Cost:
        """A plain ViT with one class token as the paper counts it.

        Args:
            start: Tokens at the start, class token included; all are charged for embedding.
            width: C.
            patch: Patch size in pixels.
            depth: Number of blocks.
            classes: Number of classes.
            ratio: Hidden width of the MLP by C.
        """
        square = float(width * width)
        return cls(
            fixed=float(start * width * 3 * patch**2 + width * classes),
            prefix=1,
            linear=(4 * square,) * depth,
            pair=(2.0 * width,) * depth,
            mlp=(2 * ratio * square,) * depth,
        )


def search_macs(kept: Tensor, start: int, cost: Cost) -> Tensor:
    """Differentiable multiply-accumulates under searched counts.

    The minimum of the tokens present and the two counts has a gradient of its own: in full to
    both counts of the block, also to the larger one, and none to the counts of earlier blocks.

    Args:
        kept: Counts of pruning and of merging, `(2, L)`.
        start: Reducible tokens at the start.
        cost: The model.

    Returns:
        A number, in the precision of `kept`.
    """
    present = kept.detach().amin(0).clamp(max=start).cummin(0).values
    n = straight_through(present, kept[0], kept[1])
    entering = torch.cat([kept.new_tensor([float(start)]), n[:-1]]) + cost.prefix
    leaving = n + cost.prefix
    linear, pair, mlp = (kept.new_tensor(c) for c in (cost.linear, cost.pair, cost.mlp))
    return cost.fixed + (linear * entering + pair * entering.square() + mlp * leaving).sum()


class Proxies(NamedTuple):
    """What the proxies say now.

    Attributes:
        kept: Tokens kept by pruning and by merging, `(2, L)`, whole numbers with gradients.
        probability: Probability that a rank is kept, `(2, L, N)` in float32.
    """

    kept: Tensor
    probability: Tensor


class RateProxies(nn.Module):
    """One distribution over token counts per block, for pruning and for merging.

    A count is the expectation over its distribution, rounded up. All logits start at zero, which
    is not "nothing reduced" but about half of the tokens in every block.

    Args:
        patches: Reducible tokens at the start.
        depth: Number of blocks.
        granularity: Step between candidate counts.
        uncompressed: Blocks that never reduce. Their single candidate is `patches`.

    Raises:
        ZooError: If an argument is out of range.
    """

    def __init__(
        self, patches: int, depth: int, granularity: int = 1, uncompressed: Sequence[int] = (0,)
    ) -> None:
        super().__init__()
        if not 1 <= granularity <= patches:
            raise ZooError(f"granularity must be in 1..{patches}, got {granularity}")
        if any(not 0 <= block < depth for block in uncompressed):
            raise ZooError(f"uncompressed must hold blocks in 0..{depth - 1}, got {uncompressed}")
        self.patches, self.granularity = patches, granularity
        sizes = [1 if b in uncompressed else -(-patches // granularity) for b in range(depth)]
        self.prune = nn.ParameterList([torch.zeros(k) for k in sizes])
        self.merge = nn.ParameterList([torch.zeros(k) for k in sizes])

    @property
    def depth(self) -> int:
        """Number of blocks L."""
        return len(self.prune)

    def candidates(self) -> Tensor:
        """Candidate counts in descending order, `(K,)`, in the precision of the expectation."""
        device = self.prune[0].device
        # Half precision would resolve sixteenths of a token, and the logits may be in it.
        dtype = torch.float32 if device.type == "mps" else torch.float64
        return torch.arange(self.patches, 0, -self.granularity, device=device, dtype=dtype)

    def forward(self) -> Proxies:
        """Counts and keep probabilities, differentiable in the logits."""
        c = self.candidates()
        # Missing candidates have probability zero.
        rows = pad_sequence([*self.prune, *self.merge], True, -torch.inf).to(c.dtype)
        share = F.pad(rows, (0, len(c) - rows.shape[1]), value=-torch.inf).softmax(-1)
        share = share.view(2, self.depth, -1)
        # Elementwise: autocast would run a matrix product in half precision.
        kept = ceil_through((share * c).sum(-1))
        # Of the candidates in descending order, those above rank i come first, for every i.
        above = (self.patches - 1 - torch.arange(self.patches, device=c.device)) // self.granularity
        return Proxies(kept, share.cumsum(-1)[..., above].float())

    @torch.no_grad()
    def counts(self) -> tuple[list[int], list[int]]:
        """Whole numbers of tokens kept by pruning and by merging, per block."""
        prune, merge = self().kept.round().long().tolist()
        return prune, merge

    def extra_repr(self) -> str:
        """Sizes, for printing."""
        return f"patches={self.patches}, depth={self.depth}, granularity={self.granularity}"
