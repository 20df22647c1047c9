"""DiffRate: prune the least attended tokens, merge the next least, at searched rates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from reduction.assignment import Assignment, Keep, Merge, apply
from reduction.base import Card
from reduction.checks import boolean, count, listed, share
from reduction.counts import Dims, Spec, Step
from reduction.errors import ZooError
from reduction.functional.diffrate_search import RateProxies, straight_mask
from reduction.functional.joining import Decision
from reduction.functional.matching import mean_of_members, most_similar
from reduction.functional.pooling import masked_average_head
from reduction.functional.settling import plain_mean
from reduction.mixins.answer import OwnAnswer
from reduction.mixins.learned import Learned
from reduction.mixins.masking import Masked
from reduction.mixins.pairing import RankedPairs
from reduction.registry import register
from reduction.schedules.per_block import PerBlock
from reduction.tokens import Signals, Tokens, take_rows


@register("diffrate")
class DiffRate(Learned, Masked, OwnAnswer, RankedPairs):
    """Prune, then merge, between attention and MLP, with two counts per block.

    Tokens are sorted by the class token's attention in this block (after the softmax, size term
    included, mean over heads). The tail behind the first count is dropped; what is then behind the
    second count joins the most similar token before it, by cosine of the residual stream. A group
    becomes the plain mean of its members, sizes do not enter; its size grows by the size of each
    newcomer times its similarity, and enters later attentions as log(size).

    The counts are what the paper learns, with everything else frozen: see `begin_search`. A
    schedule with one count per block merges down to it; `prune_share` changes that.

    Args:
        score_from: "class" (the paper's) or "column_mean" (attention received from all tokens;
            ours, for models without a class token).
        prune_share: Share of the leaving tokens that is pruned, not merged, where the schedule
            gives no count for pruning (ours; searched schedules give both).
        sort_always: Sort the tokens also in blocks that remove nothing, as the official code does.
            Changes no output, only the order of tokens inside.
        search: Null, or `{"granularity": g, "uncompressed": [blocks]}` while the counts are being
            searched: in training mode tokens are then masked, not removed, through `rates`.
        score: Rank by another score, see `ranked`; None is `score_from`.
        seed: Of the score "random", see `random`.

    Raises:
        ZooError: If an argument is out of range.

    References:
        Chen et al., ICCV 2023, arXiv 2305.17997; official code github.com/OpenGVLab/DiffRate (no
        licence file; this implementation is written from a specification, not from that code).
    """

    card = Card(
        title="DiffRate: Differentiable Compression Rate for Efficient Vision Transformers",
        authors="Chen et al.",
        venue="ICCV",
        year=2023,
        arxiv="2305.17997",
        code="https://github.com/OpenGVLab/DiffRate",
        licence="none",
        kind="prune + merge",
        training="none; search for rates",
        note="Searched schedules for DeiT and MAE ship as schedule=diffrate/deit_small_2.9 etc.",
        convention="diffrate",
    )
    site = "mid"
    prop_attn = True
    family = "constant_r"
    # `logits` is for the search only.
    reads_last_block = False
    only = (("prune_share", (0.0,)), ("sort_always", (False,)))

    def __init__(
        self,
        score_from: str = "class",
        prune_share: float = 0.0,
        sort_always: bool = False,
        search: Mapping[str, Any] | None = None,
        score: str | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(score_from, score, seed)
        self.prune_share = share("prune_share", prune_share)
        self.sort_always = boolean("sort_always", sort_always)
        self.rates: RateProxies | None = None
        self.search = None if search is None else _search_arguments(search)

    # ------------------------------------------------------------------ real removal

    @property
    def every_block(self) -> bool:  # type: ignore[override]  # a plain attribute elsewhere
        return self.sort_always or self.masking()

    def order(self, t: Tokens, score: Tensor, step: Step) -> Tensor:
        return score.topk(self._survivors(t.n, step.keep, step), dim=1).indices

    def settle(
        self, t: Tokens, kept: Tensor, rest: Tensor, score: Tensor, step: Step
    ) -> Assignment:
        if not rest.shape[1]:
            return Keep(kept)
        with torch.no_grad():
            gone, stay = take_rows(t.x, rest + t.prefix), take_rows(t.x, kept + t.prefix)
            target, similarity = most_similar(gone, stay)
        return Merge(
            None,
            kept,
            coef=mean_of_members(target, step.keep).to(t.x.dtype),
            mass=similarity * take_rows(t.patch_size, rest),
            pairs=(rest, target),
        )

    def check_thresholds(self) -> None:
        super().check_thresholds()
        if self.search is not None:
            raise ZooError(
                f"{self.name}: counts are being searched, which thresholds do not have; call "
                "end_search() first, or type search=null (reducer.search=null)"
            )

    def joins(self, t: Tokens, s: Signals, step: Step, d: Decision) -> Merge:
        gained = d.pairs.best * t.patch_size.gather(1, d.pairs.senders)
        mass = d.of_tokens(gained, t.patch_size)
        return plain_mean(d.joined(t), t.size.dtype)._replace(mass=mass)

    def _survivors(self, n: int, keep: int, step: Step) -> int:
        """Tokens left by pruning, at least those left in the end."""
        if step.budget.prune is None:
            return n - round(self.prune_share * (n - keep))
        return max(keep, min(n, step.budget.prune))

    def macs(self, n: int, prefix: int, step: Step, dims: Dims) -> int:
        return (self._survivors(n, step.keep, step) - step.keep) * step.keep * dims.width

    # ------------------------------------------------------------------ search

    def begin_search(
        self, patches: int, depth: int, granularity: int = 1, uncompressed: Sequence[int] = (0,)
    ) -> RateProxies:
        """Learn the counts from now on: in training mode tokens are masked instead of removed.

        Freeze the backbone and train `rates` only, on a loss with `search_macs` in it;
        `searched_schedule` says what was found, `end_search` forgets the search.

        Args:
            patches: Reducible tokens at the start.
            depth: Number of blocks.
            granularity: Step between candidate counts.
            uncompressed: Blocks that never reduce: the first and, where the head averages over
                patches, the last.

        Returns:
            The new, untrained proxies.
        """
        blocks = [int(b) for b in uncompressed]
        self.rates = RateProxies(patches, depth, granularity, blocks)
        self.search = {"granularity": granularity, "uncompressed": blocks}
        return self.rates

    def end_search(self) -> None:
        """Drop the proxies; the counts live on in a schedule."""
        self.rates = self.search = None

    def searched_schedule(self, prefix: int) -> PerBlock:
        """The counts as a schedule, prefix tokens included as in the paper's lists.

        Args:
            prefix: Number of prefix tokens.

        Raises:
            ZooError: If no search has begun.
        """
        if self.rates is None:
            raise ZooError("there are no searched counts; call begin_search first")
        prune, merge = ([c + prefix for c in counts] for counts in self.rates.counts())
        return PerBlock(keep=merge, prune=prune, prefix=prefix)

    def setup(self, spec: Spec) -> None:
        if self.search is not None and self.rates is None:
            self.begin_search(spec.grid[0] * spec.grid[1], spec.depth, **self.search)

    def masking(self) -> bool:
        """Only while counts are being searched."""
        return self.search is not None and self.training

    def begin(self, t: Tokens) -> Tokens:
        if not self.masking() or self.rates is None:
            return t
        self._check_count(t, self.rates)
        proxies = self.rates()
        # On the CPU, so that reading it does not wait for the device once per block.
        kept = proxies.kept.detach().round().long().cpu()
        return t._replace(memory={**t.memory, "kept": kept, "probability": proxies.probability})

    def mask(self, t: Tokens, s: Signals, step: Step) -> Tokens:
        """One block of the search: the tail is masked, and merged copies stay where they are."""
        assert self.rates is not None
        self._check_count(t, self.rates)
        counts: list[list[int]] = t.memory["kept"].tolist()
        n = min([t.n, *counts[0][: step.block], *counts[1][: step.block]])
        left = min(n, counts[0][step.block])
        keep = min(left, counts[1][step.block])
        if keep == n and not self.sort_always:
            return t
        score = self.score(t, s, step).detach()
        # Masked tokens are at the end and stay there.
        order = score[:, :n].argsort(1, descending=True)
        rest = torch.arange(n, t.n, device=order.device).expand(order.shape[0], -1)
        t = apply(t, Keep(torch.cat([order, rest], 1)))
        if keep == n:
            return t
        prune, merge = t.memory["probability"][:, step.block]
        policy = t.policy if t.policy is not None else torch.ones_like(t.size)
        if left < n:
            policy = policy * _with_prefix(straight_mask(prune, left, n), t.prefix)
        if keep < left:
            policy = policy * _with_prefix(straight_mask(merge, keep, left), t.prefix)
            t = _fold_copies(t, keep, left)
        return t._replace(policy=policy)

    @staticmethod
    def _check_count(t: Tokens, rates: RateProxies) -> None:
        if t.n != rates.patches:
            raise ZooError(
                f"the search is over counts of {rates.patches} patches, got {t.n} tokens; use the "
                "model's own image size, without patch dropout or plugins that add tokens"
            )

    def logits(self, backbone: nn.Module, t: Tokens) -> Tensor | None:
        if t.policy is None:
            return None
        pool = getattr(backbone, "global_pool", "token")
        if pool in ("token", ""):
            return None
        if pool != "avg":
            raise ZooError(
                f"the search knows heads on the class token or on the average, not {pool!r}"
            )
        return masked_average_head(backbone, t, t.policy)


def _search_arguments(search: Mapping[str, Any]) -> dict[str, Any]:
    known = {"granularity", "uncompressed"}
    if not isinstance(search, Mapping) or not set(search) <= known:
        raise ZooError(f"search must be null or a mapping with {sorted(known)}, got {search!r}")
    blocks = listed("uncompressed", search.get("uncompressed", (0,)), "a list of blocks")
    return {
        "granularity": count("granularity", search.get("granularity", 1)),
        "uncompressed": [count("uncompressed", b, 0) for b in blocks],
    }


def _fold_copies(t: Tokens, keep: int, left: int) -> Tokens:
    """Merge slots keep..left-1 into those before them, leaving the merged tokens in place.

    Unlike in real removal every size is raised to at least one before it is added; this is the
    official code's, and makes training differ from evaluation.
    """
    first, cut, end = t.prefix, t.prefix + keep, t.prefix + left
    with torch.no_grad():
        target, similarity = most_similar(t.x[:, cut:end], t.x[:, first:cut])
        source = (t.size[:, cut:end] * similarity).clamp_min(1.0)
        head = t.size[:, :cut].clamp_min(1.0).scatter_add(1, target + first, source)
        size = torch.cat([head, source, t.size[:, end:]], 1)
    x = t.x[:, :cut]
    batch, _, width = x.shape
    goal = target + first
    delta = (t.x[:, cut:end] - take_rows(x, goal)) * mean_of_members(target, keep).to(
        x.dtype
    ).unsqueeze(-1)
    flat = (goal + torch.arange(batch, device=x.device).unsqueeze(1) * cut).reshape(-1)
    merged = x.reshape(batch * cut, width).index_add(0, flat, delta.reshape(-1, width))
    x = torch.cat([merged.view(batch, cut, width), t.x[:, cut:]], 1)
    return t._replace(x=x, size=size, unit=False)


def _with_prefix(mask: Tensor, prefix: int) -> Tensor:
    return torch.cat([mask.new_ones(prefix), mask])
