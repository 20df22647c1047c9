"""Methods with learned parts, as a rule one per reducing block."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from reduction.counts import Spec, Step
from reduction.errors import ZooError


class Learned:
    """A method with learned parts."""

    def setup(self, spec: Spec) -> None:
        """Create learned parts. Called once by the wrapper, for a schedule that is solved.

        Must leave parameters alone that exist already and fit.
        """

    def reset_classifier(self, num_classes: int) -> None:
        """After the model's classifier was replaced: replace heads that learn the same classes."""

    def unused(self) -> set[str]:
        """Names of own parameters that the classifier does not see; training freezes them."""
        return set()

    def after_step(self) -> None:
        """After each step of the optimiser: bring parameters back to where they have a meaning."""


class Staged(Learned):
    """A method with one learned module per stage, in `self.stages`.

    Subclasses write `build`. Modules that fit are kept when the reducer is attached again, so
    loaded weights survive.
    """

    name: ClassVar[str]

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList()
        self._blocks: tuple[int, ...] = ()

    def build(self, spec: Spec, step: Step) -> nn.Module:
        """The learned part of one stage."""
        raise NotImplementedError(f"{type(self).__name__} must override build")

    def setup(self, spec: Spec) -> None:
        """Build the stages, unless those that are there fit."""
        fresh = [self.build(spec, step) for step in spec.stages]
        if not _same_shapes(self.stages, fresh):
            self.stages = nn.ModuleList(fresh)
        self._blocks = tuple(step.block for step in spec.stages)

    def stage(self, step: Step) -> nn.Module:
        """The learned part that belongs to a block.

        Raises:
            ZooError: If the schedule reduces in a block that it did not reduce in when the model
                was built.
        """
        if step.block not in self._blocks:
            raise ZooError(
                f"{self.name} has learned parts for blocks {list(self._blocks)}, but the schedule "
                f"reduces in block {step.block}; build the model with that schedule"
            )
        return self.stages[self._blocks.index(step.block)]


class Queries(Staged):
    """A staged method whose number of output tokens is the shape of a parameter.

    Once built, it leaves so many tokens whatever the image size. A stage has an int `outputs`.
    """

    def count(self, n: int, step: Step) -> int:
        """Outputs of the stage; before it is built, what the schedule keeps."""
        if step.block in self._blocks:
            return int(self.stage(step).outputs)  # type: ignore[arg-type]
        return min(n, step.keep)


def _same_shapes(old: nn.ModuleList, new: list[nn.Module]) -> bool:
    def shapes(modules: nn.ModuleList | list[nn.Module]) -> list[tuple[str, tuple[int, ...]]]:
        named = nn.ModuleList(modules).state_dict()
        return [(name, tuple(value.shape)) for name, value in named.items()]

    return len(old) == len(new) and shapes(old) == shapes(new)
