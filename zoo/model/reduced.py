"""The wrapper that runs a timm backbone block by block while a reducer changes its tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from reduction.assignment import unmerge
from reduction.base import Reducer
from reduction.eager import traced
from reduction.mixins.answer import OwnAnswer
from reduction.mixins.following import Extends, Remembers
from reduction.mixins.learned import Learned
from reduction.mixins.training import Outcome, Trains
from reduction.schedules.base import Schedule
from reduction.schedules.keep_rate import KeepRate
from reduction.schedules.target import Target
from reduction.tokens import Signals, Tokens
from zoo.adapters.backbones import (
    check_images,
    embed,
    grid_size,
)
from zoo.adapters.fast_linear import install, using
from zoo.adapters.heads import head
from zoo.adapters.standalone import as_standalone, check_alone
from zoo.errors import ZooError
from zoo.model.anatomy import Anatomy, check_parts, check_together
from zoo.model.block import checkpointed, prepare, run_block
from zoo.model.plan import Plan, Planner, make_plan
from zoo.model.runtime import Runtime, make_runtime
from zoo.model.stream import Info
from zoo.model.timm_api import TimmContract
from zoo.plugins.base import Plugin


class ReducedViT(TimmContract):
    """A timm backbone with a reducer inside.

    The backbone's own modules do all the work; `backbone.state_dict()` keeps timm's names. Nothing
    is stored on modules during a forward pass. With nothing to reduce the output equals the
    backbone's exactly.

    Args:
        backbone: A supported timm model.
        reducer: What to do with tokens, or None for the dense model.
        schedule: How many tokens each block keeps. None with a reducer is a keep rate of 0.7 at
            the quarter points of the depth.
        plugins: Parts that act around the blocks.
        last_block: See `zoo.model.runtime.Runtime`.
        fast_linear: See `zoo.model.runtime.Runtime`.
        target: The budget that the schedule was solved from, for the record.

    Raises:
        UnsupportedModel: If the backbone, a block or an attention class has no adapter.
        UnreachableBudget: If the schedule asks for what the method cannot do on this model.
        ZooError: If the method needs a class token that the model does not have, or a budget is
            given that has not been solved.
    """

    def __init__(
        self,
        backbone: nn.Module,
        reducer: Reducer | None = None,
        schedule: Schedule | None = None,
        plugins: Sequence[Plugin] = (),
        last_block: str = "full",
        fast_linear: str = "off",
        target: Target | None = None,
    ) -> None:
        super().__init__()
        if isinstance(schedule, Target):
            raise ZooError(
                f"{schedule.name} is solved before a model is built; call zoo.wrap or "
                "zoo.create_model, or zoo.budget.solve.solve for the schedule alone"
            )
        check_parts(backbone, reducer, plugins)
        self.backbone = backbone
        self.reducer = reducer
        self.plugins = nn.ModuleList(plugins)
        self.target = target
        self.schedule: Schedule | None = None
        if reducer is not None:
            schedule = schedule or KeepRate(0.7)
        for plugin in plugins:
            plugin.setup(backbone, target or schedule)
        check_together(self.anatomy)
        self._planner = Planner()
        self.runtime = Runtime()
        self.set_runtime(last_block=last_block, fast_linear=fast_linear)
        if reducer is not None and schedule is not None:
            self.schedule = schedule
            plans = self.plan(strict=schedule.strict)
            if isinstance(reducer, Learned):
                reducer.setup(self.anatomy.spec([p.step for p in plans]))
        self.backbone_args: dict[str, Any] = {}

    def set_runtime(self, **options: Any) -> ReducedViT:
        """Change how the model runs; what is not named stays as it is.

        Args:
            **options: Fields of `zoo.model.runtime.Runtime`.

        Returns:
            The model itself.

        Raises:
            ZooError: If an option is unknown, or invalid for this model.
        """
        self.runtime = make_runtime(self, options)
        if self.runtime.fast_linear != "off":
            install(self.backbone)
        return self

    # ------------------------------------------------------------------ counts and schedules

    @property
    def anatomy(self) -> Anatomy:
        """The model's parts and the facts about them, as they are now."""
        return Anatomy(self.backbone, self.reducer, self.plugins)

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return self.anatomy.depth

    @property
    def prefix(self) -> int:
        """Number of prefix tokens P."""
        return self.anatomy.prefix

    @property
    def grid(self) -> tuple[int, int]:
        """Patch grid at the backbone's own image size."""
        return self.anatomy.grid

    def plan(
        self,
        grid: tuple[int, int] | None = None,
        schedule: Schedule | None = None,
        strict: bool = False,
    ) -> list[Plan]:
        """Token counts of every block without running anything.

        Args:
            grid: Patch grid; None is the backbone's own.
            schedule: Another schedule than the model's.
            strict: Raise where a schedule asks for more than the method can remove.

        Raises:
            UnreachableBudget: If `strict` and something is out of reach.
        """
        chosen = schedule or self.schedule
        return make_plan(
            self.anatomy, chosen, grid, strict=strict, last_block=self.runtime.last_block
        )

    def token_counts(self) -> list[tuple[int, int]]:
        """`(entering, leaving)` of every block at the backbone's image size, prefix included."""
        return [(p.entering, p.leaving) for p in self.plan()]

    # ------------------------------------------------------------------ running

    def forward(self, images: Tensor, return_info: bool | str = False) -> Any:
        """Classify images.

        Args:
            images: `(B, 3, H, W)`.
            return_info: True also returns an `Info`; "trace" keeps the state after each block.

        Returns:
            Logits `(B, classes)`, or `(logits, info)`.

        Raises:
            UnsupportedModel: If `return_info` is asked of a standalone backbone.
        """
        if self._alone(images, {"return_info": bool(return_info)}):
            return self.backbone(images)
        if self.runtime.fast_linear == "off" or traced():
            return self._forward(images, return_info)
        with using(self.runtime.fast_linear):
            return self._forward(images, return_info)

    def _forward(self, images: Tensor, return_info: bool | str) -> Any:
        if not return_info and self._untouched():
            if not traced():
                check_images(self.backbone, images)
            return self.backbone(images)
        short = self.runtime.last_block == "class_token" and not (return_info or self.training)
        t, info, memories = self._run(
            images, track=bool(return_info), trace=return_info == "trace", short=short
        )
        logits = self._head(t, memories)
        return (logits, info) if return_info else logits

    def _untouched(self) -> bool:
        """Whether there is nothing to do but what the backbone does by itself."""
        return (
            self.reducer is None
            and not len(self.plugins)
            and self.runtime.last_block == "full"
            and not self.runtime.own_kernels
            and not getattr(self.backbone, "grad_checkpointing", False)
        )

    def forward_features(self, images: Tensor) -> Tensor:
        """Tokens after the final norm, `(B, P+M, C)`; of a standalone backbone, its own answer."""
        if self._alone(images):
            return self.backbone.forward_features(images)
        t, _, _ = self._run(images)
        return self.backbone.norm(t.x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The backbone's own head; knows nothing of sizes. `forward` does."""
        return self.backbone.forward_head(x, pre_logits=pre_logits)

    def forward_intermediates(
        self, images: Tensor, indices: int | Sequence[int] | None = None, norm: bool = False
    ) -> list[Tensor]:
        """Feature maps of chosen blocks, brought back to the full patch grid.

        Args:
            images: `(B, 3, H, W)`.
            indices: Blocks; an int takes the last so many, None takes all.
            norm: Apply the final norm.

        Returns:
            Maps `(B, C, rows, columns)`. Patches that were dropped are zero.
        """
        if self._alone(images):
            return self.backbone.forward_intermediates(
                images, indices, norm=norm, intermediates_only=True
            )
        _, info, _ = self._run(images, track=True, trace=True)
        if indices is None:
            indices = range(self.depth)
        elif isinstance(indices, int):
            indices = range(self.depth - indices, self.depth)
        maps = []
        for i in indices:
            t = info.trace[i]
            if norm:
                t = t._replace(x=self.backbone.norm(t.x))
            maps.append(unmerge(t).transpose(1, 2).unflatten(2, info.grid))
        return maps

    def _alone(self, images: Tensor, asked: dict[str, bool] | None = None) -> bool:
        """Whether the backbone runs itself, after the checks that `_run` makes for the others."""
        if as_standalone(self.backbone) is None:
            return False
        check_alone(self.backbone, asked or {})
        if not torch.compiler.is_compiling():
            check_images(self.backbone, images)
        return True

    def _run(
        self,
        images: Tensor,
        track: bool = False,
        trace: bool = False,
        schedule: Schedule | None = None,
        short: bool = False,
    ) -> tuple[Tokens, Info, list[Any]]:
        m, reducer = self.backbone, self.reducer
        if not torch.compiler.is_compiling():
            check_images(m, images)
        embedded = embed(m, images)
        grid = grid_size(m, images)
        n = embedded.x.shape[1] - self.prefix
        if track and n != grid[0] * grid[1]:
            raise ZooError(
                "the source map cannot be tracked while patch dropout removes tokens; call without "
                "return_info, or in evaluation mode"
            )
        changes = reducer is not None or len(self.plugins) > 0
        follow = changes and embedded.rope is not None
        follow = follow or (reducer is not None and "origin" in reducer.needs)
        t = Tokens.start(embedded.x, self.prefix, track=track or follow)
        embedded = embedded._replace(x=None)  # so that no later block holds on to it
        if not track:
            t = t._replace(source=None)
        memories = []
        for plugin in self.plugins:
            t, memory = plugin.start(t)
            memories.append(memory)
        if not isinstance(m.norm_pre, nn.Identity):
            t = t._replace(x=m.norm_pre(t.x))
        if isinstance(reducer, Remembers):
            t = reducer.begin(t)
        run: Callable[..., tuple[Tokens, Signals]] = run_block
        if getattr(m, "grad_checkpointing", False) and torch.is_grad_enabled():
            run = checkpointed(run_block, self.runtime.fast_linear)
        counts, states = [], []
        signals = Signals()
        moved = t.n != n
        shared = prepare(self, t, embedded)
        for i, plan in enumerate(
            self._planner.plan(
                self.anatomy, schedule or self.schedule, grid, n, "class_token" if short else "full"
            )
        ):
            entering = t.x.shape[1]
            t, signals = run(i, t, signals, plan, moved, shared)
            length = t.x.shape[1]
            for j, plugin in enumerate(shared.plugins):
                t, memories[j] = plugin.after(i, t, memories[j])
            added = t.x.shape[1] - length
            moved = moved or plan.step is not None or added > 0
            if added and isinstance(reducer, Extends):
                t = reducer.extended(t, added)
            counts.append((entering, length + added))
            if trace:
                states.append(t)
        if isinstance(reducer, OwnAnswer):
            t = reducer.finish(t)
        source = t.source if t.source is not None else t.size.new_zeros(0)
        return t, Info(tuple(counts), t.size, source, grid, tuple(states), t), memories

    def _head(self, t: Tokens, memories: Sequence[Any]) -> Tensor:
        for plugin, memory in zip(self.plugins, memories, strict=True):
            logits = plugin.head(self.backbone, t, memory)
            if logits is not None:
                return logits
        if isinstance(self.reducer, OwnAnswer):
            logits = self.reducer.logits(self.backbone, t)
            if logits is not None:
                return logits
        return head(self.backbone, t._replace(x=self.backbone.norm(t.x)))

    def peer(self, images: Tensor, targets: Tensor) -> Outcome | None:
        """A second pass of the same weights under the schedule that the reducer asks for, if any.

        Args:
            images: `(B, 3, H, W)`.
            targets: Labels `(B,)` or soft labels `(B, classes)`.
        """
        if not isinstance(self.reducer, Trains) or self.schedule is None:
            return None
        other = self.reducer.peer(self.schedule)
        if other is None:
            return None
        t, info, memories = self._run(images, track=True, trace=True, schedule=other)
        return self.outcome(info, self._head(t, memories), targets)

    def auxiliary_losses(
        self, info: Info, logits: Tensor, targets: Tensor, teacher: Outcome | None = None
    ) -> dict[str, Tensor]:
        """The reducer's own losses for a forward pass with `return_info="trace"`.

        Args:
            info: Of that pass.
            logits: Of that pass, `(B, classes)`.
            targets: Labels `(B,)` or soft labels `(B, classes)`.
            teacher: `outcome` of the dense model on the same images, if the reducer needs it.

        Returns:
            Losses by name, weights included; empty without a reducer or in most methods.
        """
        if not isinstance(self.reducer, Trains):
            return {}
        return self.reducer.auxiliary_losses(self.outcome(info, logits, targets, teacher))

    def outcome(
        self, info: Info, logits: Tensor, targets: Tensor, teacher: Outcome | None = None
    ) -> Outcome:
        """What losses may look at, with the final norm applied."""
        final = info.final._replace(x=self.backbone.norm(info.final.x))
        return Outcome(info.trace, final, logits, targets, teacher)
