"""What a reducer is: a module that looks at tokens and signals and returns an assignment.

Most methods need nothing else. What some of them are beside it, each an interface of its own, lies
in `reduction.mixins` and is asked for by `isinstance`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn

from reduction.assignment import Assignment, apply
from reduction.config import Revised
from reduction.counts import Dims, Step
from reduction.errors import ZooError
from reduction.options import Optioned
from reduction.tokens import SIGNALS, Signals, Tokens

Site = Literal["input", "pre", "attn", "mid", "post"]
#: What `Reducer.needs` may name: signals, and the origin of tokens.
NEEDS = SIGNALS | {"origin"}


@dataclass(frozen=True)
class Card:
    """Who made a method, and what it needs.

    Attributes:
        title: Title of the paper.
        authors: First author and "et al.", or all of a few.
        venue: Conference or journal; "arXiv" while unpublished.
        year: Year of the venue.
        arxiv: arXiv identifier, or None.
        code: Official implementation, or None when there is none.
        licence: Licence of the official implementation; "none" when it has no licence file.
        kind: What happens to tokens: "merge", "prune", "prune + fuse", "pattern", ...
        training: What has to be trained: "none", "fine-tuning recommended", "predictor", ...
        note: One sentence that a user must know, or empty.
        convention: How the paper counts multiply-accumulates, if not as `zoo.profile` does by
            default: another of its conventions, in which costs are then reported as well.
    """

    title: str
    authors: str
    venue: str
    year: int
    arxiv: str | None
    code: str | None
    licence: str | None
    kind: str
    training: str
    note: str = ""
    convention: str = "zoo"

    @property
    def trained(self) -> bool:
        """Whether it does little of use before something was trained."""
        return not self.training.startswith(("none", "fine-tuning"))


class Reducer(Optioned, Revised, nn.Module):
    """Base of all methods. A subclass writes `assign` and states what it needs.

    Constructor arguments must be stored under their own names: `config` reads them back, and with
    that a reducer can be written to disk and built again.

    Every method also takes `prop_attn`: "paper" (as published, the default), True or False; and one
    that drops tokens takes `settle`: "drop", or "nearest", which gives each dropped token to the
    kept one most like it, in a size-weighted mean. Neither is an argument of a subclass; one that
    answers with a plain `Keep` says `drops = True`.

    Attributes:
        card: Provenance of the method.
        site: Where it acts: at the block input ("pre"), inside the attention ("attn", see
            `reduction.mixins.attention`), between attention and MLP ("mid"), or at the block
            output ("post").
        needs: Fields of `Signals` that `assign` reads ("pre" reads those of the previous block),
            and "origin" where it reads `Tokens.origin`.
        family: Schedule family whose one free parameter `target_gmacs` solves for.
        prop_attn: Whether attention adds log(size) to its logits (proportional attention).
        added_tokens: What happens to tokens that a plugin adds: "reduce" treats them like all
            others, "spare" keeps them out of every reduction, "refuse" allows no such plugin.
        every_block: Ask for a step in every block, also where the schedule has no budget; `keep`
            is then the number of tokens present, and `reduce` must cope.
        no_thresholds: Why pairs cannot merge by thresholds that are calibrated, where the kind of
            method does not say it; see `reduction.mixins.pairing.Pairs` for those that can.
    """

    card: ClassVar[Card]
    site: Site = "mid"
    needs: frozenset[str] = frozenset()
    family: str = "keep_rate"
    prop_attn: bool = False
    added_tokens: Literal["reduce", "spare", "refuse"] = "reduce"
    every_block: bool = False
    no_thresholds: ClassVar[str] = ""

    @property
    def needs_class_token(self) -> bool:
        """Whether the model must have a class token."""
        return "cls_row" in self.needs

    def assign(self, t: Tokens, s: Signals, step: Step) -> Assignment:
        """Decide what happens to each token.

        Args:
            t: Tokens with N > `step.keep` reducible tokens.
            s: The signals named in `needs`.
            step: Budget and position.

        Returns:
            An assignment that leaves `count(N, step)` reducible tokens.
        """
        raise NotImplementedError(f"{type(self).__name__} must override assign or reduce")

    def reduce(self, t: Tokens, s: Signals, step: Step) -> Tokens:
        """Apply `assign`. Override only where no assignment can say what the method does."""
        return apply(t, self.settled(t, self.assign(t, s, step)))

    def count(self, n: int, step: Step) -> int:
        """Reducible tokens that leave when `n` enter; `step.keep` unless a method adds some."""
        return min(n, step.keep)

    def max_drop(self, n: int) -> int:
        """The most that the method can remove from `n` tokens in one block."""
        return n - 1

    def acts(self, block: int, depth: int) -> bool:
        """Whether the method does anything in a block; a schedule's budget for others is ignored.

        For work whose result nobody reads, such as clustering behind the last block.
        """
        return True

    def macs(self, n: int, prefix: int, step: Step, dims: Dims) -> int:
        """Multiply-accumulates of the method's own matrix products for one image.

        Signals are not counted here: whoever computes them counts them.
        """
        return 0


def check_needs(reducer: Reducer) -> None:
    """Refuse a reducer that asks for a signal that does not exist.

    Raises:
        ZooError: Naming the unknown signals.
    """
    unknown = reducer.needs - NEEDS
    if unknown:
        raise ZooError(
            f"{type(reducer).__name__}.needs must be a subset of {sorted(NEEDS)}, "
            f"got {sorted(unknown)}"
        )
