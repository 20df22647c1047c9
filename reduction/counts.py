"""Plain numbers that schedules, reducers and models exchange: budgets, steps, widths, costs."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    pass


class Budget(NamedTuple):
    """What a schedule allows one block.

    Attributes:
        keep: Reducible tokens to keep.
        prune: Tokens that survive pruning before merging, for methods that do both.
    """

    keep: int
    prune: int | None = None


class Step(NamedTuple):
    """Where in the network a reduction happens. Plain integers, known before any data.

    Attributes:
        block: Index of the block, from 0.
        depth: Number of blocks.
        budget: What the schedule allows here; `keep` is already clipped to what is possible.
        grid: Patch grid `(rows, columns)` of the input.
        again: Whether this is the step of an earlier block, which lasts, see
            `reduction.mixins.parking.Parks`.
    """

    block: int
    depth: int
    budget: Budget
    grid: tuple[int, int]
    again: bool = False

    @property
    def keep(self) -> int:
        """Reducible tokens to keep."""
        return self.budget.keep


class Spec(NamedTuple):
    """The model that a reducer is attached to: what learned parts are sized by.

    Attributes:
        width: C, features per token.
        heads: H, attention heads.
        head_dim: d, features per head.
        depth: Number of blocks.
        prefix: P, prefix tokens.
        grid: Patch grid `(rows, columns)`.
        classes: Number of classes, 0 for a model without classifier.
        steps: The reduction of each block, None where nothing happens.
        reads: What the classifier pools: "class" (the class token) or "patches".
        mean: What was subtracted from pixels in [0, 1], one number per channel.
        std: What they were divided by.
    """

    width: int
    heads: int
    head_dim: int
    depth: int
    prefix: int
    grid: tuple[int, int]
    classes: int
    steps: tuple[Step | None, ...]
    reads: str = "class"
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)

    @property
    def stages(self) -> list[Step]:
        """The blocks that reduce, in order."""
        return [s for s in self.steps if s is not None]


class Dims(NamedTuple):
    """Widths that decide what a reducer's own products cost.

    Attributes:
        width: C, features per token.
        heads: H, attention heads.
        head_dim: d, features per head.
        class_tokens: Leading tokens that together act as the class token.
        patch_macs: Multiply-accumulates of embedding one patch.
    """

    width: int
    heads: int
    head_dim: int
    class_tokens: int = 1
    patch_macs: int = 0


class BlockCost(NamedTuple):
    """Cost of one block in multiply-accumulates for one image.

    Attributes:
        tokens_in: Tokens entering, prefix included.
        tokens_mid: Tokens in the MLP.
        tokens_out: Tokens leaving.
        linear: qkv, projection and other linear layers of the attention module.
        attention: The two products with the attention map.
        mlp: Linear layers of the MLP.
        reducer: The reducer's own products and the signals computed for it.
    """

    tokens_in: int
    tokens_mid: int
    tokens_out: int
    linear: int
    attention: int
    mlp: int
    reducer: int
