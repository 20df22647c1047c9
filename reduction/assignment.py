"""A reducer's answer as data, and the one place where features, sizes and maps change.

Shapes as in `reduction.tokens`; M is the number of reducible tokens afterwards. All indices
count reducible tokens only: 0 is the first token after the prefix.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from reduction.tokens import Tokens, flat_rows, take_rows


class Keep(NamedTuple):
    """Keep some tokens and drop the others.

    Attributes:
        index: Kept tokens, `(B, M)` int64, or `(M,)` when all images keep the same.
        valid: `(B, M)` bool, False where a row is padding because this image keeps fewer.
        slot: Kept token that stands for each token from now on, `(B, N)` int64 in `[0, M)`, or -1.
            Features are still those of the kept tokens alone; sizes and the source map count the
            others in. Padding stands for none.
    """

    index: Tensor  # type: ignore[assignment]  # shadows tuple.index, which nobody needs here
    valid: Tensor | None = None
    slot: Tensor | None = None


class Merge(NamedTuple):
    """Put tokens into groups; a group becomes one token.

    Either `slot` or `pairs` says who goes where. With `pairs`, the leaders are the groups and
    the sources fold into them: the same weighted mean, touching only what changes.

    Attributes:
        slot: Group of each token, `(B, N)` int64 in `[0, M)`, or -1 to drop it.
        leader: The token that gives a group its position, `(B, M)` int64.
        coef: Mixing coefficients `(B, N)`: a group is `sum(coef * x)`. None is the size-weighted
            mean.
        mass: What each token adds to the size of its group, `(B, N)`. None is its size.
        pairs: `(source, target)`, each `(B, r)`: token `source` joins group `target`. Then `coef`
            and `mass` are of the sources only, `(B, r)`: the share of a source in its group, of
            which the leader keeps the rest, and what it adds to the leader's size.
        valid: `(B, M)` bool, False where a group is padding because this image has fewer. With
            `slot` only, as are tokens with padding: padded tokens join no group, whatever `slot`
            says of them.
    """

    slot: Tensor | None
    leader: Tensor
    coef: Tensor | None = None
    mass: Tensor | None = None
    pairs: tuple[Tensor, Tensor] | None = None
    valid: Tensor | None = None


class Mix(NamedTuple):
    """Every new token is a weighted sum of all old ones.

    Attributes:
        weights: `(B, M, N)`, or `(M, N)` when all images share them.
        values: What is mixed, `(B, N, C)`; None mixes the tokens themselves.
        mass: Sizes of the new tokens `(B, M)`. None shares the total size evenly, because soft
            weights need not add up to the tokens they stand for.
        leader: Old token that gives each new one its position, `(B, M)`. None: no position.
    """

    weights: Tensor
    values: Tensor | None = None
    mass: Tensor | None = None
    leader: Tensor | None = None


class Fuse(NamedTuple):
    """Keep some tokens, and add up all others into one more token behind them.

    Attributes:
        leader: Kept tokens and, last, the dropped one that gives the new token its position,
            `(B, M)` int64; M counts the new token.
        weights: Share of each token in the new one, `(B, N)`: zero for those that are kept.
    """

    leader: Tensor
    weights: Tensor


Assignment = Keep | Merge | Mix | Fuse


def apply(t: Tokens, a: Assignment) -> Tokens:
    """Carry out an assignment. Prefix tokens pass through untouched.

    Args:
        t: Tokens with N reducible tokens.
        a: The assignment.

    Returns:
        Tokens with M reducible tokens and updated sizes, origins, sources and masks, which lie in
        no raster any more.

    Raises:
        TypeError: If `a` is no assignment.
    """
    if isinstance(a, Keep):
        return _keep(t, a)
    grouped = isinstance(a, Merge) and a.pairs is None
    if t.policy is not None or (t.mask is not None and not grouped):
        raise ValueError(
            "expected tokens without padding or a policy, because pairs and mixtures do not "
            "follow them, nor groups a policy; prune with Keep, or override Reducer.reduce"
        )
    if isinstance(a, Merge):
        if a.pairs is None:
            return _merge(t, a)
        if a.valid is not None:
            raise ValueError("expected either padding (valid) or pairs, got both")
        return _fold(t, a)
    if isinstance(a, Mix):
        return _mix(t, a)
    if isinstance(a, Fuse):
        return _fuse(t, a)
    raise TypeError(f"expected Keep, Merge, Mix or Fuse, got {type(a).__name__}")


def unmerge(t: Tokens, fill: float = 0.0) -> Tensor:
    """Give every input patch the features of the token that now holds it.

    Args:
        t: Tokens that track `source`.
        fill: Value for patches that were dropped.

    Returns:
        `(B, N0, C)`, row-major over the patch grid.

    Raises:
        ValueError: If the source map was not tracked.
    """
    if t.source is None:
        raise ValueError(
            "unmerge needs the source map; call the model with return_info=True "
            "or start with Tokens.start(x, prefix, track=True)"
        )
    rows = take_rows(t.patches, t.source.clamp_min(0))
    return torch.where((t.source >= 0).unsqueeze(-1), rows, fill)


def _with_prefix(index: Tensor, prefix: int) -> Tensor:
    """Turn indices of reducible tokens into rows of the whole sequence, prefix in front."""
    if not prefix:
        return index
    head = torch.arange(prefix, device=index.device)
    if index.dim() == 2:
        head = head.expand(index.shape[0], -1)
    return torch.cat([head, index + prefix], dim=-1)


def _slots_of(index: Tensor, batch: int, n: int) -> Tensor:
    """Invert a `(B, M)` list of kept tokens into `(B, N)` slots, -1 for the others."""
    index = index.expand(batch, -1)
    slot = index.new_full((batch, n), -1)
    order = torch.arange(index.shape[1], device=index.device)
    return slot.scatter(1, index, order.expand_as(index))


def _follow(source: Tensor | None, slot: Tensor) -> Tensor | None:
    """Compose the source map with a slot map."""
    if source is None:
        return None
    return torch.where(source >= 0, slot.gather(1, source.clamp_min(0)), -1)


def _origin(t: Tokens, leader: Tensor) -> Tensor | None:
    return None if t.origin is None else take_rows(t.origin, leader)


def _keep(t: Tokens, a: Keep) -> Tokens:
    rows = _with_prefix(a.index, t.prefix)
    source, size = t.source, take_rows(t.size, rows)
    if a.slot is not None:
        source = _follow(source, a.slot)
        members = _group_sum(t.patch_size, a.slot, a.index.shape[-1])
        size = torch.cat([t.size[:, : t.prefix], members], dim=1)
    elif source is not None:
        index = a.index if a.valid is None else a.index.masked_fill(~a.valid, t.n)
        slot = _slots_of(index, t.x.shape[0], t.n + (a.valid is not None))
        source = _follow(source, slot)
    mask = t.mask
    if mask is not None:
        mask = take_rows(mask, rows)
    if a.valid is not None:
        head = a.valid.new_ones(a.valid.shape[0], t.prefix)
        valid = torch.cat([head, a.valid], dim=1)
        mask = valid if mask is None else mask & valid
    return t._replace(
        x=take_rows(t.x, rows),
        size=size,
        unit=t.unit and a.slot is None,
        origin=_origin(t, a.index),
        source=source,
        policy=None if t.policy is None else take_rows(t.policy, rows),
        mask=mask,
        grid=None,
    )


def _accumulate_dtype(x: Tensor) -> torch.dtype:
    return torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype


def _fold(t: Tokens, a: Merge) -> Tokens:
    """Weighted mean by moving only the leaders that receive something.

    With `s'` the final size of a group, adding `(x_src - x_leader) * s_src / s'` for every source
    gives exactly `sum(s x) / s'`, however many sources a group has; so do other shares.
    """
    assert a.pairs is not None
    source, target = a.pairs
    batch, n, width = t.x.shape
    m = t.prefix + a.leader.shape[1]
    # Every list of rows once, as rows of all images together, for features and sizes alike.
    stay = flat_rows(_with_prefix(a.leader, t.prefix), n)
    gone, goal = flat_rows(source + t.prefix, n), flat_rows(target + t.prefix, m)
    features, sizes = t.x.reshape(-1, width), t.size.reshape(-1)
    x, size = features.index_select(0, stay), sizes.index_select(0, stay)
    moved = sizes.index_select(0, gone) if a.mass is None else a.mass.to(size.dtype).reshape(-1)
    size = size.index_add_(0, goal, moved)
    dtype = _accumulate_dtype(x)
    if a.coef is None:
        share = moved.to(dtype) / size.index_select(0, goal).to(dtype)
    else:
        share = a.coef.to(dtype).reshape(-1)
    delta = features.index_select(0, gone) - x.index_select(0, goal)
    delta = (delta.to(dtype) * share.unsqueeze(-1)).to(x.dtype)
    # The rows are fresh and were read above, so this may write into them.
    merged = x.index_add_(0, goal, delta)
    map_ = t.source
    if map_ is not None:
        slot = _slots_of(a.leader, batch, t.n).scatter(1, source, target)
        map_ = _follow(map_, slot)
    return t._replace(
        x=merged.view(batch, m, width),
        size=size.view(batch, m),
        unit=False,
        origin=_origin(t, a.leader),
        source=map_,
        grid=None,
    )


def _group_sum(values: Tensor, slot: Tensor, m: int) -> Tensor:
    """Sum `(B, N)` or `(B, N, C)` rows by slot; slot -1 goes nowhere."""
    batch = slot.shape[0]
    bins = torch.where(slot < 0, m, slot)
    if values.dim() == 2:
        return values.new_zeros(batch, m + 1).scatter_add(1, bins, values)[:, :m]
    out = values.new_zeros(batch * (m + 1), values.shape[2])
    out = out.index_add_(0, flat_rows(bins, m + 1), values.reshape(-1, values.shape[2]))
    return out.view(batch, m + 1, -1)[:, :m]


def _merge(t: Tokens, a: Merge) -> Tokens:
    assert a.slot is not None
    m = a.leader.shape[-1]
    patches, size, slot = t.patches, t.patch_size, a.slot
    valid = a.valid
    if t.mask is not None:
        slot = torch.where(t.mask[:, t.prefix :], slot, -1)
        if valid is None:
            valid = _group_sum(torch.ones_like(size), slot, m) > 0
    dtype = _accumulate_dtype(patches)
    mass = size if a.mass is None else a.mass
    new_size = _group_sum(mass, slot, m)
    if a.coef is None:
        total = new_size if a.mass is None else _group_sum(size, slot, m)
        if valid is not None:
            total = torch.where(valid, total, 1.0)
        x = _group_sum(patches.to(dtype) * size.unsqueeze(-1).to(dtype), slot, m)
        x = x / total.unsqueeze(-1).to(dtype)
    else:
        x = _group_sum(patches.to(dtype) * a.coef.unsqueeze(-1).to(dtype), slot, m)
    out = _replace_patches(
        t, x.to(patches.dtype), new_size, _origin(t, a.leader), _follow(t.source, slot)
    )
    if valid is None:
        return out
    head = valid.new_ones(valid.shape[0], t.prefix)
    return out._replace(mask=torch.cat([head, valid], dim=1))


def _mix(t: Tokens, a: Mix) -> Tokens:
    values = t.patches if a.values is None else a.values
    weights = a.weights if a.weights.dim() == 3 else a.weights.expand(values.shape[0], -1, -1)
    m = weights.shape[1]
    x = torch.bmm(weights.to(values.dtype), values).to(t.x.dtype)
    size = a.mass
    if size is None:
        size = (t.patch_size.sum(1, keepdim=True) / m).expand(-1, m)
    origin = None
    if t.origin is not None:
        if a.leader is None:
            origin = t.origin.new_full((x.shape[0], m), -1)
        else:
            origin = take_rows(t.origin, a.leader)
    source = None
    if t.source is not None:
        source = _follow(t.source, weights.argmax(1))
    return _replace_patches(t, x, size, origin, source)


def _fuse(t: Tokens, a: Fuse) -> Tokens:
    batch, m = a.leader.shape
    rows = _with_prefix(a.leader, t.prefix)
    x, size = take_rows(t.x, rows), take_rows(t.size, rows)
    dtype = _accumulate_dtype(x)
    fused = torch.bmm(a.weights.unsqueeze(1).to(dtype), t.patches.to(dtype))
    # All others are left to the new token, so its size needs no look at who they are.
    others = t.patch_size.sum(1) - size[:, t.prefix : -1].sum(1)
    # The rows are fresh: writing into the last one spares a copy of all.
    x[:, -1:] = fused.to(x.dtype)
    size[:, -1] = others
    source = t.source
    if source is not None:
        slot = _slots_of(a.leader[:, :-1], batch, t.n)
        source = _follow(source, torch.where(slot < 0, m - 1, slot))
    origin = _origin(t, a.leader)
    return t._replace(x=x, size=size, unit=False, origin=origin, source=source, grid=None)


def _replace_patches(
    t: Tokens, x: Tensor, size: Tensor, origin: Tensor | None, source: Tensor | None
) -> Tokens:
    if t.prefix:
        x = torch.cat([t.x[:, : t.prefix], x], dim=1)
        size = torch.cat([t.size[:, : t.prefix], size.to(t.size.dtype)], dim=1)
    return t._replace(x=x, size=size, unit=False, origin=origin, source=source, grid=None)
