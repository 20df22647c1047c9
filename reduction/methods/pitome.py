"""PiToMe: merge tokens from large groups of similar ones, protect the isolated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from reduction.assignment import Merge
from reduction.base import Card, Reducer
from reduction.checks import boolean, finite, is_list, one_of
from reduction.counts import Dims, Step
from reduction.errors import ZooError
from reduction.functional.energy import ENERGIES, energy
from reduction.functional.matching import head_sum, unit
from reduction.functional.portable import best_of, stable_order
from reduction.methods.dtome import DToMe
from reduction.mixins.calibrating import TakesThresholds
from reduction.registry import register
from reduction.tokens import Signals, Tokens, take_rows

MODES = ("bsm", "pitome")
ORDERS = ("bsm_first", "pitome_first", *MODES)


@register("pitome")
class PiToMe(TakesThresholds, Reducer):
    """Protect Informative Tokens before Merging.

    Between attention and MLP, every patch gets an energy: how much of the image resembles it. With
    `u` the unit-length mean over heads of the keys,

        E_i = mean_j elu(u_i . u_j - m_b)        m_b = margin * (1 - b / depth) in block b

    Patches are ranked by descending energy. In mode "pitome" the first `2r` ranks split by parity
    and each of the even ones joins its most similar odd one; the others, of low energy, are
    protected. In mode "bsm" all ranks split by parity and the `r` most similar pairs merge. A group
    becomes its size-weighted mean; sizes are carried on. The order of rows never matters.

    The official count rule is `r = floor(n - n * rate)` in every block, which is
    `schedule=keep_rate schedule.of=current schedule.rounding=ceil schedule.blocks=all`.

    Args:
        mode: "bsm_first" (official for class-token models: "bsm" in the first half of the blocks,
            rounded up, "pitome" in the second), "pitome_first" (official for MAE), one mode for all
            blocks, or a list with one mode per block. The paper describes "pitome" alone.
        margin: Margin of the first block, falling linearly to zero behind the last; or a list with
            one margin per block.
        energy: "elu" (the official code's), or "paper": `cos` itself above the margin, `exp(cos -
            m) - 1` below (as the paper's text is remembered, not checked).
        prop_attn: Proportional attention; ours, the official attention never sees the sizes.

    Raises:
        ZooError: If an argument is unknown.

    References:
        Tran et al., NeurIPS 2024, arXiv 2405.16148; official code github.com/hchautran/PiToMe
        (CC-BY-NC 4.0; this implementation is written from a specification, not from that code).
    """

    card = Card(
        title="Accelerating Transformers with Spectrum-Preserving Token Merging",
        authors="Tran et al.",
        venue="NeurIPS",
        year=2024,
        arxiv="2405.16148",
        code="https://github.com/hchautran/PiToMe",
        licence="CC-BY-NC 4.0",
        kind="merge",
        training="none",
        note="Forward pass as the official code; the paper describes one of its two modes.",
    )
    site = "mid"
    needs = frozenset({"k"})
    family = "geometric"

    def __init__(
        self,
        mode: str | Sequence[str] = "bsm_first",
        margin: float | Sequence[float] = 0.75,
        energy: str = "elu",
        prop_attn: bool = False,
    ) -> None:
        super().__init__()
        names = ORDERS if isinstance(mode, str) else MODES
        given = [mode] if isinstance(mode, str) else list(mode) if is_list(mode) else []
        if not given or any(m not in names for m in given):
            raise ZooError(
                f"mode must be one of {ORDERS}, or a list of {MODES} with one per block, "
                f"got {mode!r}"
            )
        margins: list[Any] = list(margin) if is_list(margin) else [margin]
        if not margins or not all(finite(m) for m in margins):
            raise ZooError(f"margin must be a number or a list of numbers, got {margin!r}")
        self.mode: str | list[str] = mode if isinstance(mode, str) else given
        self.margin: float | list[float] = margins if is_list(margin) else margins[0]
        self.energy = one_of("energy", energy, ENERGIES)
        self.prop_attn = boolean("prop_attn", prop_attn)

    def thresholded(self) -> DToMe:
        """All ranks are paired in every block: a threshold protects the isolated by itself."""
        if not isinstance(self.margin, int | float):
            raise ZooError(
                f"margin={self.margin}: with thresholds pitome takes one number; type margin=0.75"
            )
        return DToMe(
            prop_attn=self.prop_attn, order="energy", margin=self.margin, energy=self.energy
        )

    def max_drop(self, n: int) -> int:
        return n // 2

    def mode_of(self, block: int, depth: int) -> str:
        """Mode of a block, "bsm" or "pitome".

        Raises:
            ZooError: If a list has no entry for it.
        """
        if not isinstance(self.mode, str):
            return self.mode[_entry("mode", self.mode, block)]
        if self.mode in MODES:
            return self.mode
        first = block < (depth + 1) // 2
        return "bsm" if first == (self.mode == "bsm_first") else "pitome"

    def margin_of(self, block: int, depth: int) -> float:
        """Margin of a block.

        Raises:
            ZooError: If a list has no entry for it.
        """
        if isinstance(self.margin, int | float):
            return self.margin - self.margin * block / depth
        return self.margin[_entry("margin", self.margin, block)]

    @torch.no_grad()
    def assign(self, t: Tokens, s: Signals, step: Step) -> Merge:
        u = unit(head_sum(s.need("k")[:, :, t.prefix :]))
        similarity = u @ u.transpose(1, 2)
        score = energy(similarity, self.margin_of(step.block, step.depth), self.energy)
        rank = stable_order(score, descending=True)
        r = t.n - step.keep
        only_top = self.mode_of(step.block, step.depth) == "pitome"
        top = rank[:, : 2 * r] if only_top else rank
        senders, receivers = top[:, ::2], top[:, 1::2]
        # Rows of senders and columns of receivers of what is there already.
        rows = take_rows(similarity, senders)
        columns = receivers.unsqueeze(1).expand(-1, senders.shape[1], -1)
        best, target = best_of(rows.gather(2, columns))
        if only_top:
            source, stay = senders, rank[:, 2 * r :]
        else:
            order = stable_order(best, descending=True)
            stay = senders.gather(1, order[:, r:])
            source, target = senders.gather(1, order[:, :r]), target.gather(1, order[:, :r])
        leader = torch.cat([stay, receivers], dim=1)
        return Merge(None, leader, pairs=(source, target + stay.shape[1]))

    def macs(self, n: int, prefix: int, step: Step, dims: Dims) -> int:
        return n * n * dims.head_dim


def _entry(what: str, values: Sequence[object], block: int) -> int:
    if block >= len(values):
        raise ZooError(
            f"{what} lists {len(values)} blocks, but block {block} reduces; give one entry per "
            "block"
        )
    return block
