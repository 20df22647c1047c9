"""The wrapper around a backbone and whatever changes its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

from torch import Tensor, nn

from reduction.base import Reducer
from reduction.eager import traced
from reduction.functional.restoring import check_policy
from reduction.mixins.answer import OwnAnswer
from reduction.mixins.learned import Learned
from reduction.mixins.training import Outcome, Trains
from reduction.schedules.base import Schedule
from reduction.schedules.keep_rate import KeepRate
from reduction.schedules.target import Target
from zoo.adapters.fast_linear import install, using
from zoo.adapters.standalone import check_alone
from zoo.adapters.tower import Tower, tower_of
from zoo.errors import ZooError
from zoo.model.anatomy import Anatomy, check_parts, check_together
from zoo.model.empty import for_any_batch
from zoo.model.features import classify, features, intermediates
from zoo.model.placed import ATTACHED
from zoo.model.plan import Plan, Planner, make_plan
from zoo.model.runtime import Runtime, make_runtime
from zoo.model.sizes import by_features, for_any_sizes
from zoo.model.stream import Info as Info
from zoo.model.stream import flow, leave
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
        linear: See `zoo.model.runtime.Runtime`.
        target: The budget that the schedule was solved from, for the record.

    Raises:
        UnsupportedModel: If the backbone, a block or an attention class has no adapter.
        UnreachableBudget: If the schedule asks for what the method cannot do on this model.
        ZooError: If the method needs a class token that the model does not have, or a budget is
            given that has not been solved.
    """

    #: What dense outputs give to patches that were merged or dropped, where nobody says otherwise.
    restoring: str = "merged"

    def __init__(
        self,
        backbone: nn.Module,
        reducer: Reducer | None = None,
        schedule: Schedule | None = None,
        plugins: Sequence[Plugin] = (),
        last_block: str = "full",
        linear: str = "plain",
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
        self.planner = Planner()
        self.runtime = Runtime()
        self.set_runtime(last_block=last_block, linear=linear)
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
        self.runtime = make_runtime(self.anatomy, self.runtime, options)
        if self.runtime.linear != "plain":
            install(self.backbone)
        return self

    # ------------------------------------------------------------------ counts and schedules

    @property
    def anatomy(self) -> Anatomy:
        """The model's parts and the facts about them, as they are now."""
        return Anatomy(self.backbone, self.reducer, self.plugins)

    @property
    def tower(self) -> Tower:
        """How the backbone's family is run."""
        return tower_of(self.backbone)

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

    @for_any_sizes
    @for_any_batch
    def forward(self, images: Tensor, return_info: bool | str = False) -> Any:
        """Classify images.

        Args:
            images: `(B, 3, H, W)`, or a padded batch of patches where the family takes it (NaFlex).
            return_info: True also returns an `Info`; "trace" keeps the state after each block.

        Returns:
            Logits `(B, classes)`, or `(logits, info)`.

        Raises:
            UnsupportedModel: If `return_info` is asked of a standalone backbone.
        """
        alone = self.checked(images, {"return_info": bool(return_info)})
        with self.linear():
            if alone or (not return_info and self._untouched()):
                return self.tower.whole(self.backbone, images)
            # In place of its backbone a wrapper has no flag of its own that anybody sets.
            whole = return_info or self.training or self.backbone.training
            out = flow(
                self,
                images,
                track=bool(return_info),
                trace=return_info == "trace",
                last_block="full" if whole else self.runtime.last_block,
            )
            logits = leave(self, out)
        return (logits, out.info) if return_info else logits

    @for_any_sizes
    @for_any_batch
    def forward_features(self, x: Tensor) -> Tensor:
        """Tokens after the final norm, `(B, P+M, C)`; of a standalone backbone, its own answer.

        The tensor brings along what `forward_head` has to know of its tokens.

        Args:
            x: Images `(B, 3, H, W)`.
        """
        if self.checked(x):
            return self.backbone.forward_features(x)  # type: ignore[no-any-return]
        return features(self, flow(self, x))

    def forward_head(
        self, x: Tensor, pre_logits: bool = False, sizes: Tensor | None = None
    ) -> Tensor:
        """The head on what `forward_features` returned: what `forward` answers.

        Args:
            x: The tensor itself; what is computed from it no longer knows what its tokens are.
            pre_logits: Stop before the classifier.
            sizes: Patches in each token, `(B, P+M)`, where `x` does not bring them along.

        Raises:
            ZooError: If a head that averages cannot know what to weigh the tokens by.
        """
        if self.anatomy.alone is not None:
            return self.backbone.forward_head(x, pre_logits=pre_logits)  # type: ignore[no-any-return]
        return by_features(partial(classify, self, pre_logits=pre_logits), x, sizes)

    @for_any_sizes
    @for_any_batch
    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        restore: str | None = None,
    ) -> Any:
        """Features of chosen blocks, brought back to the full patch grid, as timm hands them out.

        Args:
            x: Images `(B, 3, H, W)`.
            indices: Blocks, negative ones from the end; an int takes the last so many, None all.
            return_prefix_tokens: Give `(map, prefix tokens)` in place of every map.
            norm: Apply the final norm to them.
            stop_early: Run no block behind the last one that is asked for.
            output_fmt: "NCHW" for maps `(B, C, rows, columns)`, "NLC" for `(B, rows * columns, C)`.
            intermediates_only: Leave the final features out.
            output_dict: Give a mapping with `image_features` and `image_intermediates`.
            attn_mask: Must be None: tokens change from block to block.
            is_causal: Must be False.
            restore: What a patch gets that was merged or dropped; None is what `restoring` says.
                "merged": the features of the token that stands for it, zero where none does.
                "nearest": those of the nearest patch at which a token sits. "zero": none. "knn": a
                mean of the most similar tokens, see `reduction.functional.restoring`.

        Returns:
            `(features, maps)`, or the maps; in the order of the blocks.

        Raises:
            ZooError: If there is no such block, format or policy, or attention is to be masked.
        """
        if attn_mask is not None or is_causal:
            raise ZooError(
                "attn_mask and is_causal are not possible here: a reduced model merges and drops "
                "tokens, so places cannot be masked; leave them out"
            )
        options: dict[str, Any] = {
            "return_prefix_tokens": return_prefix_tokens,
            "norm": norm,
            "stop_early": stop_early,
            "output_fmt": output_fmt,
            "intermediates_only": intermediates_only,
            **({"output_dict": True} if output_dict else {}),
        }
        if self.checked(x, {f"restore={restore!r}": restore is not None}):
            return self.backbone.forward_intermediates(x, indices, **options)
        policy = check_policy(self.restoring if restore is None else restore)
        return intermediates(self, x, indices, **options, restore=policy)

    def checked(self, images: Tensor, asked: dict[str, bool] | None = None) -> bool:
        """Refuse images that do not fit; says whether the backbone runs itself, whatever else."""
        alone = self.anatomy.alone is not None
        if alone:
            check_alone(self.backbone, asked or {})
        if not traced():
            self.tower.check_images(self.backbone, images)
        return alone

    def unchanged(self, batches: Sequence[Tensor]) -> bool:
        """Whether the model answers these images as the backbone does, with nothing to reduce.

        Args:
            batches: Images of one size each.
        """
        if self.reducer is None or self.anatomy.alone is not None:
            return self.anatomy.alone is not None or self._untouched()
        plain = self._untouched(reducer=True) and not isinstance(self.reducer, OwnAnswer)
        grids = {self.tower.grid_of(self.backbone, images) for images in batches}
        plans = [plan for grid in grids for plan in self.plan(grid)]
        return plain and all(p.step is None and p.entry is None for p in plans)

    def _untouched(self, reducer: bool = False) -> bool:
        """Whether there is nothing to do but what the backbone does by itself."""
        return (
            (reducer or self.reducer is None)
            and ATTACHED not in vars(self.backbone)  # it would come back to its wrapper
            and not len(self.plugins)
            and self.runtime.last_block == "full"
            and not self.runtime.own_kernels
            and not self.tower.checkpointing(self.backbone)
        )

    def linear(self) -> AbstractContextManager[Any]:
        """Which product linear layers are computed with."""
        mode = self.runtime.linear
        return nullcontext() if mode == "plain" or traced() else using(mode)

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
        out = flow(self, images, track=True, trace=True, schedule=other)
        return self.outcome(out.info, leave(self, out), targets)

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
        final = info.final._replace(x=self.tower.norm(self.backbone, info.final.x))
        return Outcome(info.trace, final, logits, targets, teacher)
