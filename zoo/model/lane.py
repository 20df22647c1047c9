"""What one forward pass decides before it runs: a frame for all blocks, and a stage for each.

There are three ways (lanes) through a block, and all of them compute the same. `Whole` calls the
block as it is, where nobody listens or changes anything inside. `Halves` goes through its modules,
so that tokens may change between attention and MLP and a reducer may listen. `Line` resolves a
plain block to its parameters, for plain evaluation on a CPU, where asking modules for their parts
costs as much as computing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from reduction.base import Reducer
from reduction.mixins.attention import InAttention
from reduction.mixins.gating import Gates, MlpGates
from reduction.schedules.base import Schedule
from reduction.tokens import Signals, Tokens
from zoo.adapters.tower import Embedded
from zoo.model.plan import Plan

#: `(t, signals, step) -> t`: a reduction at one of its sites, or anything else behind a block.
Reduce = Callable[[Tokens, Signals, Any], Tokens]
#: `(block, t, weights)`: gets the attention weights of a block, `(B, H, queries, keys)`, and the
#: tokens that are the keys; further keys of a method stand behind them.
Watch = Callable[[int, Tokens, Tensor], None]
#: Signals that somebody outside wants, by block.
Hear = Mapping[int, frozenset[str]]
NOBODY: Hear = MappingProxyType({})
#: `(block, before, behind)`: gets the tokens before and behind a reduction; block -1 is the input.
Note = Callable[[int, Tokens, Tokens], None]


class Lane(Protocol):
    """One way through a block."""

    def attention(self, t: Tokens, stage: Stage) -> tuple[Tokens, Signals]:
        """Tokens with the attention branch added, and the signals that are wanted."""

    def mlp(self, x: Tensor) -> Tensor:
        """`x` with the MLP branch added, `(B, N, C)`."""

    def mlp_seen(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The same, and the branch alone, layer scale included and drop path left out.

        Raises:
            UnsupportedModel: If the block adds no one thing.
        """

    def mlp_gated(self, x: Tensor, gates: MlpGates) -> Tensor:
        """`mlp` with parts of it switched off.

        Raises:
            UnsupportedModel: If the block has no one MLP.
        """


class Frame(NamedTuple):
    """What the blocks of one forward pass share.

    Attributes:
        reducer: Of the model, or None.
        plugins: Of the model.
        schedule: Of the model, or None.
        own_kernels: See `zoo.model.runtime.Runtime`.
        embedded: From `Tower.embed`.
        class_tokens: Leading tokens that act as the class token, at least 1.
        watch: Wants the attention weights of every block, or None.
        note: Wants the tokens before and behind every reduction, or None.
        bias: `(block, t, changed) -> bias`: `Tower.bias` of this pass, or None where the family has
            none.
    """

    reducer: Reducer | None
    plugins: Sequence[Any]
    schedule: Schedule | None
    own_kernels: bool
    embedded: Embedded
    class_tokens: int
    watch: Watch | None = None
    note: Note | None = None
    bias: Callable[[int, Tokens, bool], Tensor | None] | None = None


class Stage(NamedTuple):
    """One block of one forward pass: what is going to happen, decided before anything does.

    Attributes:
        block: Which block.
        plan: Its counts.
        frame: What it shares with the others.
        lane: The way through it.
        halves: The way that serves everybody, for passes in which tokens come to carry a policy or
            the reducer takes part in the attention.
        positions_changed: Whether tokens are no longer in their first places.
        before: Reduction at the block input ("pre"), or None.
        between: Reduction between attention and MLP ("mid"), or None.
        behind: What happens at the block output: the reduction ("post"), and whatever a method does
            when a block is over; or None.
        asks: Whether `halves` may be needed although `lane` is another one.
        inside: The reducer, if it may take part in the attention, or None.
        keeps: Whether the signals of the attention are wanted behind the MLP.
        shows_mlp: Whether the signals of the MLP are wanted.
        gates: The reducer, if it switches parts of this block, or None.
        shows_input: Whether what enters the attention is wanted.
    """

    block: int
    plan: Plan
    frame: Frame
    lane: Lane
    halves: Lane
    positions_changed: bool
    before: Reduce | None
    between: Reduce | None
    behind: Reduce | None
    asks: bool
    inside: InAttention | None
    keeps: bool
    shows_mlp: bool
    shows_input: bool
    gates: Gates | None = None
