"""What a reducer is: a module that looks at tokens and signals and returns an assignment."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from torch import Tensor, nn

from reduction.assignment import Assignment, Keep, apply
from reduction.config import Configured
from reduction.counts import Dims, Spec, Step
from reduction.errors import ZooError
from reduction.tokens import SIGNALS, Signals, Tokens

if TYPE_CHECKING:
    from reduction.schedules.base import Schedule

Site = Literal["pre", "attn", "mid", "post"]


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


class AttentionInput(NamedTuple):
    """What one attention is about to compute, for reducers that act inside it.

    Attributes:
        q: Queries `(B, H, P+N, d)`, rotated where the model has rotary embedding.
        k: Keys, likewise.
        v: Values.
        scale: Factor on the logits.
        bias: Added to the logits, broadcastable to `(B, H, P+N, P+N)`, or None.
        dropout: Dropout rate of the attention weights.
        fused: Whether the model allows a fused kernel.
        need: Signals that are wanted.
        class_tokens: Leading tokens that together act as the class token.
        again: What the attention would compute for other tokens of the residual stream; with True
            only `v` of it is filled. Given where `Reducer.rereads` says so.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    bias: Tensor | None
    dropout: float
    fused: bool
    need: frozenset[str]
    class_tokens: int = 1
    again: Callable[[Tokens, bool], AttentionInput] | None = None


class Outcome(NamedTuple):
    """What a reducer's own losses may look at.

    Attributes:
        trace: State after each block, features included.
        final: State after the last block and the final norm.
        logits: `(B, classes)`.
        targets: Labels `(B,)` or soft labels `(B, classes)`.
        teacher: The same of the frozen dense model on the same images, if `needs_teacher`; or of
            the same weights under another schedule, if there is a `Reducer.peer`.
    """

    trace: tuple[Tokens, ...]
    final: Tokens
    logits: Tensor
    targets: Tensor
    teacher: Outcome | None = None


class AttentionOutput(NamedTuple):
    """Result of an attention that a reducer computed itself.

    Attributes:
        out: `(B, H, P+M, d)`; M is N unless tokens were removed inside.
        signals: What was wanted.
        tokens: The residual stream with M reducible tokens if it changed, else None.
    """

    out: Tensor
    signals: Signals
    tokens: Tokens | None = None


class Reducer(Configured, nn.Module):
    """Base of all methods. A subclass writes `assign` and states what it needs.

    Constructor arguments must be stored under their own names: `config` reads them back, and with
    that a reducer can be written to disk and built again.

    Attributes:
        name: Registry name, set by `reduction.register`.
        card: Provenance of the method.
        site: Where it acts: at the block input ("pre"), inside the attention ("attn", see
            `attend`), between attention and MLP ("mid"), or at the block output ("post").
        needs: Fields of `Signals` that `assign` reads. "pre" reads those of the previous block.
        needs_origin: Whether `assign` reads `Tokens.origin`.
        prop_attn: Whether attention adds log(size) to its logits (proportional attention).
        family: Schedule family whose one free parameter `target_gmacs` solves for.
        needs_class_token: Whether the model must have a class token.
        every_block: Ask for a step in every block, also where the schedule has no budget; `keep`
            is then the number of tokens present, and `reduce` must cope.
        adaptive: The number of kept tokens depends on the image, so counts are only known by
            running; `count` is then what the schedule asks for, an expectation.
        masks_in_training: `reduce` keeps all tokens while training and masks them instead.
        needs_teacher: `auxiliary_losses` compares with the frozen dense model.
        parks: Tokens that a step takes out are not gone: `restore` puts them back before the next
            step and behind the last block ("stage"), or behind every block, and then a step lasts
            until the next one ("block"). Counts are planned so.
        rereads: What `attend` computes again, with `AttentionInput.again`, from the tokens that it
            has reduced: "values", which then are not computed before; "all"; or "no".
        reads_last_block: Whether what happens in the last block to tokens other than the prefix
            can reach the logits in evaluation mode. None: it can if the class overrides `attend`,
            `guests`, `finish` or `logits`, or parks tokens.
        added_tokens: What happens to tokens that a plugin adds: "reduce" treats them like all
            others, "spare" keeps them out of every reduction, "refuse" allows no such plugin.
        convention: How the paper counts multiply-accumulates, if not as `zoo.profile` does by
            default: another of its conventions, in which costs are then reported as well.
    """

    name: ClassVar[str] = ""
    card: ClassVar[Card]
    site: Site = "mid"
    needs: frozenset[str] = frozenset()
    needs_origin: bool = False
    prop_attn: bool = False
    family: str = "keep_rate"
    needs_class_token: bool = False
    every_block: bool = False
    adaptive: bool = False
    masks_in_training: bool = False
    needs_teacher: bool = False
    parks: Literal["no", "stage", "block"] = "no"
    rereads: Literal["no", "values", "all"] = "no"
    reads_last_block: bool | None = None
    added_tokens: Literal["reduce", "spare", "refuse"] = "reduce"
    convention: ClassVar[str] = "zoo"

    def __setattr__(self, name: str, value: Any) -> None:
        # Counts are planned once and remembered; see `revision`.
        super().__setattr__(name, value)
        self.__dict__["_revision"] = self.revision + 1

    @property
    def revision(self) -> int:
        """Grows with every attribute that is set: what was planned before may be out of date."""
        count: int = self.__dict__.get("_revision", 0)
        return count

    def setup(self, spec: Spec) -> None:
        """Create learned parts. Called once by the wrapper, after the schedule is solved.

        Must leave parameters alone that exist already and fit.
        """

    def reset_classifier(self, num_classes: int) -> None:
        """After the model's classifier was replaced: replace heads that learn the same classes."""

    def unused(self) -> set[str]:
        """Names of own parameters that the classifier does not see; training freezes them."""
        return set()

    def start(self, t: Tokens) -> Tokens:
        """Before the first block: prepare `Tokens.memory` or a policy."""
        return t

    def attend(self, a: AttentionInput, t: Tokens, step: Step | None) -> AttentionOutput | None:
        """Replace the attention of a block, or leave it alone by returning None.

        Called in every block of reducers that override it. With `site = "attn"` and a step, the
        returned tokens are the residual stream that the (shorter) output is added to.
        """
        return None

    def guests(self, t: Tokens, step: Step) -> Tensor | None:
        """Rows `(B, G, C)` that take part in a reducing block's attention and then are gone.

        They are keys and queries without a position, and the signals do not show them.
        """
        return None

    def listens(self, block: int, steps: Sequence[Step | None]) -> bool:
        """Whether a block computes the signals in `needs`.

        As a rule where they are read: in blocks with a step, or, for "pre", in those before them.
        """
        block += self.site == "pre"
        return block < len(steps) and steps[block] is not None

    def observe(self, t: Tokens, s: Signals, block: int) -> Tokens:
        """Behind a block that computed signals: note in `Tokens.memory` what they say."""
        return t

    def restores(self, block: int, depth: int) -> bool:
        """Whether tokens that are parked behind this block, where it is their turn, come back."""
        return True

    def restore(self, t: Tokens) -> Tokens:
        """Put parked tokens back, see `parks`."""
        return t

    def extended(self, t: Tokens, added: int) -> Tokens:
        """After a plugin put `added` tokens behind the others: keep `Tokens.memory` in step."""
        return t

    def finish(self, t: Tokens) -> Tokens:
        """After the last block, before the final norm: bring parked tokens back."""
        return t

    def logits(self, backbone: nn.Module, t: Tokens) -> Tensor | None:
        """Logits from the final tokens (before the final norm), or None for the usual head."""
        return None

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
        return apply(t, self.assign(t, s, step))

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

    def attention_macs(self, n: int, kept: int, width: int) -> int:
        """Multiply-accumulates of the two attention products.

        Args:
            n: Tokens entering, prefix included.
            kept: Rows that are computed: n, or fewer where tokens are removed inside.
            width: Heads times head width.
        """
        return 2 * n * kept * width

    def auxiliary_losses(self, outcome: Outcome) -> dict[str, Tensor]:
        """Losses to add to the classification loss while training, by name, weights included."""
        return {}

    def peer(self, schedule: Schedule) -> Schedule | None:
        """Another schedule under which training also runs the same weights on the same images.

        The result is `Outcome.teacher`, with gradients. None: no second pass.
        """
        return None

    def after_step(self) -> None:
        """After each step of the optimiser: bring parameters back to where they have a meaning."""


class ScoreReducer(Reducer):
    """Keep the tokens with the highest score. A subclass writes `score`."""

    def score(self, t: Tokens, s: Signals, step: Step) -> Tensor:
        """Scores `(B, N)`, higher is kept."""
        raise NotImplementedError(f"{type(self).__name__} must override score")

    def assign(self, t: Tokens, s: Signals, step: Step) -> Assignment:
        """Keep the `step.keep` best tokens, in no particular order."""
        score = self.score(t, s, step)
        return Keep(score.topk(step.keep, dim=1, sorted=False).indices)


SCORES = ("class", "column_mean")


def attention_score(s: Signals, score_from: str, prefix: int) -> Tensor:
    """Importance from attention, `(B, N)`.

    Args:
        s: Signals with `cls_row` or `column`.
        score_from: "class": what the class token pays, averaged over heads. "column_mean": what a
            token receives, averaged over heads and queries.
        prefix: Number of prefix tokens, which get no score.
    """
    if score_from == "class":
        assert s.cls_row is not None
        return s.cls_row.mean(1)[:, prefix:]
    assert s.column is not None
    return s.column[:, prefix:]


def score_signal(score_from: str) -> frozenset[str]:
    """The signal that `attention_score` reads.

    Raises:
        ZooError: If `score_from` is neither "class" nor "column_mean".
    """
    if score_from not in SCORES:
        raise ZooError(f"score_from must be one of {SCORES}, got {score_from!r}")
    return frozenset({"cls_row" if score_from == "class" else "column"})


def check_needs(reducer: Reducer) -> None:
    """Refuse a reducer that asks for a signal that does not exist.

    Raises:
        ZooError: Naming the unknown signals.
    """
    unknown = reducer.needs - SIGNALS
    if unknown:
        raise ZooError(
            f"{type(reducer).__name__}.needs must be a subset of {sorted(SIGNALS)}, "
            f"got {sorted(unknown)}"
        )
