"""Dense outputs of what is left: a row for every input patch, whatever became of it.

Shapes: B batch, N0 input patches, M tokens that are left, C width. A token sits at the patch that
gives it its position (`Tokens.origin`); a patch at which a token sits was kept, all others were
removed, be it by merging or by dropping.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from reduction.assignment import unmerge
from reduction.errors import ZooError
from reduction.functional.superpixels import squared_distances
from reduction.tokens import Tokens, take_rows

#: What removed patches get; "merged" is the default.
POLICIES = ("merged", "nearest", "zero", "knn")
#: Of Expedit: what similar features weigh less by, and how many tokens a patch is made of.
TEMPERATURE, NEIGHBOURS = 0.02, 20
#: What a reduction found and what it left: reducible tokens before and after.
Change = tuple[Tokens, Tokens]
_NOTED = "restore"


def check_policy(name: object) -> str:
    """A policy by its name.

    Raises:
        ZooError: If there is no such policy.
    """
    if name not in POLICIES:
        raise ZooError(f"restore must be one of {', '.join(POLICIES)}, got {name!r}")
    return str(name)


def restored(
    t: Tokens, grid: tuple[int, int], policy: str, changes: Sequence[Change] = ()
) -> Tensor:
    """A row for every input patch, `(B, N0, C)`, row-major over the grid.

    Args:
        t: Tokens that track `source` and `origin`.
        grid: Patch grid `(rows, columns)`.
        policy: "merged": a copy of the token that stands for the patch, or what the method has
            noted (`note_restore`); zero where no token does.
            "zero": zero for every removed patch. "nearest": the token that sits nearest there,
            of equally near ones the first. "knn": a mean of the tokens that were most similar when
            the reduction happened, see `knn_weights`.
        changes: For "knn": every reduction so far, in order.

    Raises:
        ZooError: If there is no such policy, or it has nothing to go by.
    """
    check_policy(policy)
    if policy == "merged":
        return _as_noted(t)
    if policy == "knn":
        return _backwards(t, changes)
    place = _sitting(t, grid[0] * grid[1])
    if policy == "nearest":
        place = _nearest(place, grid)
    rows = take_rows(t.patches, place.clamp_min(0))
    return torch.where((place >= 0).unsqueeze(-1), rows, 0.0)


def _sitting(t: Tokens, patches: int) -> Tensor:
    """The token that sits at each patch, `(B, N0)`; -1 where none does."""
    if t.origin is None:
        raise ZooError("tokens do not know where they sit; start them with track=True")
    place = t.origin.new_full((t.origin.shape[0], patches + 1), -1)
    origin = t.origin
    if t.mask is not None:
        origin = torch.where(t.mask[:, t.prefix :], origin, -1)
    order = torch.arange(origin.shape[1], device=origin.device).expand_as(origin)
    return place.scatter(1, torch.where(origin < 0, patches, origin), order)[:, :patches]


def _nearest(place: Tensor, grid: tuple[int, int]) -> Tensor:
    """The token that sits nearest to each patch; -1 for an image in which none sits anywhere."""
    index = torch.arange(grid[0] * grid[1], device=place.device)
    spot = torch.stack([index // grid[1], index % grid[1]], dim=1)
    distance = (spot.unsqueeze(1) - spot.unsqueeze(0)).square().sum(-1)
    far = 2 * max(grid) ** 2 + 1
    # Whole numbers, so that the first of equally near ones can be asked for as the smallest.
    ranked = distance * len(index) + index
    ranked = torch.where((place >= 0).unsqueeze(1), ranked.unsqueeze(0), far * len(index))
    return place.gather(1, ranked.min(2).values % len(index))


def knn_weights(
    before: Tensor,
    after: Tensor,
    neighbours: int = NEIGHBOURS,
    temperature: float = TEMPERATURE,
    live: Tensor | None = None,
    l2: bool = False,
) -> Tensor:
    """What every token before a reduction is made of after it, `(B, N, M)`; rows add up to one.

    A token weighs `exp(-temperature * |f - c|^2)`, for the `neighbours` most similar and all that
    are as similar as the last of these. The smallest distance is taken off before the exponential,
    so that features far from all others have weights, too.

    Args:
        before: Features before it, `(B, N, C)`.
        after: Features after it, `(B, M, C)`.
        neighbours: How many tokens.
        temperature: How sharply similarity counts.
        live: False marks padding after it, `(B, M)`.
        l2: Divide by the Euclidean norm of the weights instead of their sum, as the official code.

    References:
        Expedit, Liang et al., NeurIPS 2022, arXiv 2210.01035.
    """
    exact = torch.promote_types(before.dtype, torch.float32)
    before, after = before.to(exact), after.to(exact)
    logits = -temperature * squared_distances(after, before)
    if live is not None:
        logits = logits.masked_fill(~live.unsqueeze(1), -torch.inf)
    last = logits.topk(min(neighbours, logits.shape[2]), dim=2).values[..., -1:]
    weight = (logits - logits.amax(2, keepdim=True)).exp().masked_fill(logits < last, 0.0)
    return F.normalize(weight, dim=2) if l2 else weight / weight.sum(2, keepdim=True)


def note_restore(t: Tokens, out: Tokens, weights: Tensor) -> Tokens:
    """Remember how the tokens before a reduction come back from those behind it.

    Reductions in several blocks are undone one after the other, in one product. Nothing is noted
    where nobody follows the patches.

    Args:
        t: Tokens before, N reducible ones.
        out: Tokens behind, M of them.
        weights: `(B, N, M)`.
    """
    if t.source is None:
        return out
    earlier = t.memory.get(_NOTED)
    if earlier is not None:
        # Tokens that a plugin added since lie last, and no patch is in them.
        weights = earlier @ weights[:, : earlier.shape[2]]
    elif t.n != t.source.shape[1]:
        weights = take_rows(weights, t.source.clamp_min(0))
    return out._replace(memory={**out.memory, _NOTED: weights})


def _as_noted(t: Tokens) -> Tensor:
    """As the method noted, or of the token that holds the patch."""
    weights = t.memory.get(_NOTED)
    if weights is None:
        return unmerge(t)
    return (weights @ t.patches[:, : weights.shape[2]].to(weights.dtype)).to(t.x.dtype)


def _backwards(t: Tokens, changes: Sequence[Change]) -> Tensor:
    """From the tokens that are left, reduction by reduction, back to the patches."""
    x = t.patches
    for before, after in reversed(changes):
        if after is before:
            continue
        live = None if after.mask is None else after.mask[:, after.prefix :]
        weights = knn_weights(before.patches, after.patches, live=live)
        # What plugins have appended since then stands behind.
        x = (weights @ x[:, : after.n].float()).to(x.dtype)
    return x
