"""Merging methods of pairs: the form of each that merges by thresholds instead of by counts."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from torch import Tensor

from reduction.assignment import Assignment, apply
from reduction.base import Reducer
from reduction.checks import typed
from reduction.counts import Budget, Dims, Spec, Step
from reduction.errors import ZooError
from reduction.functional.joining import Decision, Partners, partners, ranked_partners
from reduction.functional.matching import head_sum
from reduction.functional.squeezing import squeezed
from reduction.mixins.calibrating import Calibrates, Partnered, TakesThresholds
from reduction.mixins.ranking import ScoreReducer
from reduction.options import Option
from reduction.tokens import Signals, Tokens

Thresholds = bool | Literal["limit"]


class Pairs(TakesThresholds, Partnered, Reducer):
    """A merging method of pairs, in which one pair has one similarity.

    It says who would merge into whom, `partners`, and what a group becomes, `joins`. The rest is
    the option `thresholds`: built with it, a method is the form of itself that merges every pair
    above the threshold of the block, see `ByThresholds`. True: thresholds alone decide. "limit":
    and further pairs merge, the most similar first, until no more tokens are left than the schedule
    says. `zoo calibrate` sets it, and finds the thresholds.

    Attributes:
        compares: What is compared: "feature" (the residual stream) or "key" (mean over heads).
        capped: At most half of the tokens can merge in one block.
        only: Arguments and the values that they may have with thresholds. Where that is one alone,
            calibration chooses it.
    """

    compares: ClassVar[Literal["feature", "key"]] = "feature"
    capped: ClassVar[bool] = True
    only: ClassVar[tuple[tuple[str, tuple[Any, ...]], ...]] = ()

    @classmethod
    def common_options(cls) -> Mapping[str, Option]:
        """Those of every reducer, and `thresholds`."""
        hint = Option(False, Thresholds, "bool | str")
        return {**super().common_options(), "thresholds": hint}

    @classmethod
    def form_for(cls, chosen: Mapping[str, Any]) -> type[Reducer]:
        """The class to build: a method, or its form with thresholds.

        Raises:
            ZooError: If `thresholds` is none of its values.
        """
        method = cls.__dict__.get("method", cls)
        found = chosen.get("thresholds", False)
        if not isinstance(found, bool) and found != "limit":
            raise ZooError(
                "thresholds must be true (they alone decide), false, or 'limit' (no more tokens "
                f"than the schedule says), got {found!r}"
            )
        return form_of(method) if found else method

    def choose(  # type: ignore[override]  # by keyword only, as all options are given
        self, *, thresholds: Thresholds = False, **options: Any
    ) -> None:
        """The options that every reducer has; `thresholds` has chosen the class already."""
        super().choose(**options)

    def alike(self, t: Tokens, s: Signals, step: Step) -> Tensor:
        """What is compared by cosine, `(B, N, d)`."""
        if self.compares == "key":
            return head_sum(s.need("k")[:, :, t.prefix :].detach())
        return t.patches.detach()

    def partners(self, t: Tokens, s: Signals, step: Step) -> Partners:
        """Who would merge: every other token, into the one of the others most like it."""
        return partners(t, self.alike(t, s, step))

    def pairs_in(self, block: int) -> bool:
        """Whether the method can tell who is alike in a block."""
        return True

    def joins(self, t: Tokens, s: Signals, step: Step, d: Decision) -> Assignment:
        """What becomes of those who merge; a size-weighted mean. Arguments as of `unite`."""
        return d.joined(t)

    def unite(self, t: Tokens, s: Signals, step: Step, d: Decision) -> Tokens:
        """Apply `joins`. Override only where no assignment can say what the method does."""
        return apply(t, self.joins(t, s, step, d))

    def check_thresholds(self) -> None:
        """Refuse arguments that have no meaning with thresholds.

        Raises:
            ZooError: Naming what to type instead.
        """
        given = self.arguments()
        for name, values in self.only:
            if given[name] not in values:
                words = ", or ".join(f"reducer.{name}={typed(value)}" for value in values)
                raise ZooError(
                    f"{self.name}: {name}={given[name]!r} is of merging by counts, and no pair has "
                    f"a threshold with it; type {words}"
                )

    def thresholded(self) -> Calibrates:
        """The form of this reducer with thresholds, with the same learned parts.

        Raises:
            ZooError: If some argument has no meaning there.
        """
        chosen = {name: values[0] for name, values in self.only if len(values) == 1}
        form = type(self)(**{**self.arguments(), **chosen, "thresholds": True})
        assert isinstance(form, Calibrates) and isinstance(form, Reducer)
        for name, module in self.named_children():
            setattr(form, name, module)
        form.train(self.training)
        return form


class ScoredPairs(ScoreReducer, Pairs):
    """A method of pairs that ranks, too."""

    def check_thresholds(self) -> None:
        """Refuse a draw, too, which follows from how many tokens there are, padding among them."""
        super().check_thresholds()
        if self.score_name == "random":
            raise ZooError(
                f"{self.name}: score='random' is drawn for a number of tokens that is known "
                "before, which thresholds do not leave; type score='class' (reducer.score=class), "
                "or 'norm'"
            )


class RankedPairs(ScoredPairs):
    """A method that ranks and then merges; with thresholds the lower half merges into the upper.

    Attributes:
        squeezing: With thresholds a group is squeezed, at this temperature; None: no.
    """

    squeezing: float | None = None

    def partners(self, t: Tokens, s: Signals, step: Step) -> Partners:
        """Who of the less important half would merge into the more important one."""
        return ranked_partners(t, self.alike(t, s, step), self.score(t, s, step).detach())

    def joins(self, t: Tokens, s: Signals, step: Step, d: Decision) -> Assignment:
        """See `Pairs`."""
        return d.joined(t) if self.squeezing is None else squeezed(t, d, self.squeezing)


class ByThresholds(Calibrates):
    """What a method of pairs has with thresholds; comes before the method in a class.

    Who merges is decided without a gradient, so nothing that is learned for it is learned here.

    Attributes:
        method: The class that this is a form of.
    """

    method: ClassVar[type[Pairs]]
    every_block = True

    def choose(self, thresholds: Thresholds = True, **options: Any) -> None:
        """The options of the method; no thresholds are there yet."""
        super().choose(**options)  # type: ignore[misc]  # of the method behind
        self.limit = thresholds == "limit"
        self.no_thresholds_yet()
        assert isinstance(self, Pairs)
        self.check_thresholds()

    def arguments(self) -> dict[str, Any]:
        """Constructor arguments and options of the method, and `thresholds`."""
        own: dict[str, Any] = super().arguments()  # type: ignore[misc]  # of the method behind
        return {**own, "thresholds": "limit" if self.limit else True}

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy and pickle by the method's class: this one is made when it is asked for."""
        whole: Any = super().__reduce_ex__(protocol)
        return (_blank, (self.method,), *whole[2:])

    @property
    def limited(self) -> bool:  # type: ignore[override]  # a plain attribute elsewhere
        """Whether the schedule is a limit."""
        return self.limit

    def setup(self, spec: Spec) -> None:
        """Thresholds, and the method's own parts for the blocks that its schedule reduces in."""
        assert isinstance(self, Pairs)
        n = spec.grid[0] * spec.grid[1]
        steps: list[Step | None] = []
        for step in spec.steps:
            steps.append(step if step is not None and step.keep < n else None)
            n = n if step is None else self.count(n, step)
        super().setup(spec._replace(steps=tuple(steps)))

    def unused(self) -> set[str]:
        """All learned parts: who merges is decided without a gradient."""
        assert isinstance(self, Pairs)
        return {name for name, _ in self.named_parameters()}

    def masking(self) -> bool:
        """Never: tokens merge in training as they do in evaluation."""
        return False

    def max_drop(self, n: int) -> int:
        """What the schedule may ask for."""
        if not self.limit:
            return n - 1  # thresholds alone: nothing is asked for
        most: int = super().max_drop(n)  # type: ignore[misc]  # of the method behind
        return min(most, n // 2) if self.capped else most

    def count(self, n: int, step: Step) -> int:
        """The limit."""
        return min(n, step.keep) if self.limit else n

    def idle(self, step: Step) -> bool:
        """Where nothing merges, and where the method cannot tell who is alike."""
        assert isinstance(self, Pairs)
        return super().idle(step) or (self.calibrating is None and not self.pairs_in(step.block))

    def macs(self, n: int, prefix: int, step: Step, dims: Dims) -> int:
        """All pairs are compared, whether they merge or not."""
        half = step._replace(budget=Budget(n - n // 2))
        compared: int = super().macs(n, prefix, half, dims)  # type: ignore[misc]
        return compared


@functools.cache
def form_of(method: type[Pairs]) -> type[Pairs]:
    """The form of a method with thresholds."""
    own = {"method": method, "__module__": method.__module__, "__doc__": method.__doc__}
    metaclass: Any = type(method)
    made: Any = metaclass(f"{method.__name__}ByThresholds", (ByThresholds, method), own)
    found: type[Pairs] = made
    return found


def _blank(method: type[Pairs]) -> Pairs:
    """An instance of the form without content, for copies and pickles."""
    cls: Any = form_of(method)
    blank: Pairs = cls.__new__(cls)
    return blank


def live_tokens(t: Tokens) -> Tensor | None:
    """Which reducible tokens are no padding, `(B, N)`, or None where all are."""
    return None if t.mask is None else t.mask[:, t.prefix :]
