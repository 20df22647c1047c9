"""The wrapper that runs a timm backbone block by block while a reducer changes its tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from reduction.assignment import unmerge
from reduction.base import Reducer, Step
from reduction.errors import UnreachableBudget
from reduction.functional.attention import attention_bias
from reduction.schedule import KeepRate, Schedule, TargetGmacs
from reduction.tokens import Signals, Tokens
from zoo.adapters.attention import attend
from zoo.adapters.backbones import (
    Embedded,
    check_backbone,
    check_images,
    embed,
    grid_size,
    has_class_token,
    head,
    rope_for,
)
from zoo.adapters.blocks import block_adapter
from zoo.errors import ZooError
from zoo.plugins.base import Plugin


class Info(NamedTuple):
    """What happened to the tokens in one forward pass.

    Attributes:
        tokens: `(entering, leaving)` per block, prefix tokens included.
        size: Patches that each final token stands for, `(B, P+N)`.
        source: Final slot of each input patch `(B, N0)`, -1 where it was dropped. Slots count
            reducible tokens from 0.
        grid: Patch grid `(rows, columns)`.
        losses: The reducer's auxiliary losses by name; empty in evaluation.
        trace: State after each block, if asked for with `return_info="trace"`.
        final: State after the last block, before the final norm.
    """

    tokens: tuple[tuple[int, int], ...]
    size: Tensor
    source: Tensor
    grid: tuple[int, int]
    losses: dict[str, Tensor]
    trace: tuple[Tokens, ...]
    final: Tokens


class Plan(NamedTuple):
    """Counts of one block, known without data; all of them include prefix tokens.

    Attributes:
        entering: Tokens entering the block.
        attention: Tokens in its attention.
        mlp: Tokens in its MLP.
        leaving: Tokens leaving it, a plugin's additions included.
        step: The reduction, or None.
        need: Signals that the block's attention computes.
    """

    entering: int
    attention: int
    mlp: int
    leaving: int
    step: Step | None
    need: frozenset[str]


class ReducedViT(nn.Module):
    """A timm backbone with a reducer inside.

    The backbone's own modules do all the work; `backbone.state_dict()` keeps timm's names. Nothing
    is stored on modules during a forward pass. With nothing to reduce the output equals the
    backbone's exactly.

    Args:
        backbone: A supported timm model.
        reducer: What to do with tokens, or None for the dense model.
        schedule: How many tokens each block keeps. None with a reducer is a keep rate of 0.7 at
            the quarter points of the depth. A `TargetGmacs` is solved here.
        plugins: Parts that act around the blocks.

    Raises:
        UnsupportedModel: If the backbone, a block or an attention class has no adapter.
        UnreachableBudget: If the schedule asks for what the method cannot do on this model.
        ZooError: If the method needs a class token that the model does not have.
    """

    def __init__(
        self,
        backbone: nn.Module,
        reducer: Reducer | None = None,
        schedule: Schedule | None = None,
        plugins: Sequence[Plugin] = (),
    ) -> None:
        super().__init__()
        check_backbone(backbone)
        self.backbone = backbone
        self.reducer = reducer
        self.plugins = nn.ModuleList(plugins)
        for plugin in plugins:
            plugin.setup(backbone)
        if reducer is not None and reducer.needs_class_token and not has_class_token(backbone):
            raise ZooError(
                f"reducer {reducer.name!r} scores tokens by the class token, which this model does "
                "not have; use score_from='column_mean' (attention received from all tokens)"
            )
        self.target = schedule if isinstance(schedule, TargetGmacs) else None
        self.schedule: Schedule | None = None
        if reducer is not None:
            self.schedule = self._resolve(schedule or KeepRate(0.7))
            self.plan(strict=self.schedule.strict)
        self.backbone_args: dict[str, Any] = {}

    # ------------------------------------------------------------------ counts and schedules

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.backbone.blocks)

    @property
    def prefix(self) -> int:
        """Number of prefix tokens P."""
        return int(self.backbone.num_prefix_tokens)

    @property
    def grid(self) -> tuple[int, int]:
        """Patch grid at the backbone's own image size."""
        rows, columns = self.backbone.patch_embed.grid_size
        return int(rows), int(columns)

    def _resolve(self, schedule: Schedule) -> Schedule:
        if not isinstance(schedule, TargetGmacs):
            return schedule
        from zoo.flops import gmacs, patch_and_head_gmacs

        assert self.reducer is not None
        fixed = patch_and_head_gmacs(self.backbone)
        try:
            return schedule.solve(
                lambda s: gmacs(self, s, fixed=fixed).total,
                gmacs(self, None, fixed=fixed).total,
                self.grid[0] * self.grid[1],
                self.reducer.family,
            )
        except UnreachableBudget as error:
            raise UnreachableBudget(f"{self.reducer.name or 'reducer'}: {error}") from error

    def _step(
        self, block: int, n: int, n0: int, grid: tuple[int, int], schedule: Schedule | None
    ) -> Step | None:
        """The reduction of one block, with the request clipped to what the method can do."""
        if self.reducer is None or schedule is None:
            return None
        budget = schedule.budget(block, self.depth, n, n0)
        if budget is None or budget.keep >= n or n <= 1:
            return None
        keep = max(budget.keep, n - self.reducer.max_drop(n), 1)
        if keep >= n:
            return None
        return Step(block, self.depth, budget._replace(keep=keep), grid)

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
        grid = grid or self.grid
        schedule = schedule or self.schedule
        n0 = grid[0] * grid[1]
        n = n0 + sum(p.added(-1, self.depth) for p in self.plugins)
        steps: list[Step | None] = []
        counts: list[tuple[int, int, int, int]] = []
        site = self.reducer.site if self.reducer is not None else "mid"
        for block in range(self.depth):
            entering = n
            step = self._step(block, n, n0, grid, schedule)
            if strict and schedule is not None and self.reducer is not None:
                self._check(block, n, n0, schedule)
            after = n if step is None or self.reducer is None else self.reducer.count(n, step)
            at_attention = after if site == "pre" else entering
            at_mlp = entering if site == "post" else after
            n = after + sum(p.added(block, self.depth) for p in self.plugins)
            steps.append(step)
            counts.append((entering, at_attention, at_mlp, n))
        return [
            Plan(*(c + self.prefix for c in row), step, self._need(block, steps))
            for block, (row, step) in enumerate(zip(counts, steps, strict=True))
        ]

    def _need(self, block: int, steps: Sequence[Step | None]) -> frozenset[str]:
        if self.reducer is None:
            return frozenset()
        if self.reducer.site == "pre":
            block += 1
        active = block < len(steps) and steps[block] is not None
        return self.reducer.needs if active else frozenset()

    def _check(self, block: int, n: int, n0: int, schedule: Schedule) -> None:
        assert self.reducer is not None
        budget = schedule.budget(block, self.depth, n, n0)
        limit = self.reducer.max_drop(n)
        if budget is not None and schedule.refuses(block, self.depth, n, n0, limit):
            raise UnreachableBudget(
                f"{schedule!r} removes {n - budget.keep} of {n} tokens in block {block}, but "
                f"{self.reducer.name or type(self.reducer).__name__} can remove at most {limit} "
                "there; remove fewer, or clip with strict=False (schedule.strict=false)"
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
        """
        t, info, memories = self._run(images, track=bool(return_info), trace=return_info == "trace")
        logits = self._head(t, memories)
        return (logits, info) if return_info else logits

    def forward_features(self, images: Tensor) -> Tensor:
        """Tokens after the final norm, `(B, P+M, C)`."""
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

    def _run(
        self, images: Tensor, track: bool = False, trace: bool = False
    ) -> tuple[Tokens, Info, list[Any]]:
        m = self.backbone
        if not torch.compiler.is_compiling():
            check_images(m, images)
        embedded = embed(m, images)
        grid = grid_size(m, images)
        n0 = grid[0] * grid[1]
        x = embedded.x
        if track and x.shape[1] - self.prefix != n0:
            raise ZooError(
                "the source map cannot be tracked while patch dropout removes tokens; call without "
                "return_info, or in evaluation mode"
            )
        reducer = self.reducer
        follow = track or (
            reducer is not None and (embedded.rope is not None or reducer.needs_origin)
        )
        t = Tokens.start(x, self.prefix, track=follow)
        if not track:
            t = t._replace(source=None)
        memories = []
        for plugin in self.plugins:
            t, memory = plugin.start(t)
            memories.append(memory)
        if not isinstance(m.norm_pre, nn.Identity):
            t = t._replace(x=m.norm_pre(t.x))
        run: Callable[..., tuple[Tokens, Signals]] = self._block
        if getattr(m, "grad_checkpointing", False) and torch.is_grad_enabled():
            run = _checkpointed(self._block)
        counts, states = [], []
        signals = Signals()
        moved = len(self.plugins) > 0
        for i in range(self.depth):
            entering = t.x.shape[1]
            step = self._step(i, t.n, n0, grid, self.schedule)
            t, signals = run(i, t, signals, embedded, step, moved, n0, grid)
            moved = moved or step is not None
            for j, plugin in enumerate(self.plugins):
                t, memories[j] = plugin.after(i, t, memories[j])
            counts.append((entering, t.x.shape[1]))
            if trace:
                states.append(t)
        losses: dict[str, Tensor] = {}
        if self.training and reducer is not None:
            losses = reducer.auxiliary_losses(tuple(states))
        source = t.source if t.source is not None else t.size.new_zeros(0)
        info = Info(tuple(counts), t.size, source, grid, losses, tuple(states), t)
        return t, info, memories

    def _block(
        self,
        i: int,
        t: Tokens,
        signals: Signals,
        embedded: Embedded,
        step: Step | None,
        moved: bool,
        n0: int,
        grid: tuple[int, int],
    ) -> tuple[Tokens, Signals]:
        """One block with its reduction: the unit of gradient checkpointing."""
        block, reducer = self.backbone.blocks[i], self.reducer
        adapter = block_adapter(block)
        site = reducer.site if reducer is not None else None
        if step is not None and site == "pre":
            t = reducer.reduce(t, signals, step)  # type: ignore[union-attr]
            moved = True
        # Signals are for this block's reduction, or at its end for the next block's "pre".
        need: frozenset[str] = frozenset()
        if reducer is not None and reducer.needs:
            if site != "pre" and step is not None:
                need = reducer.needs
            elif site == "pre" and i + 1 < self.depth:
                if self._step(i + 1, t.n, n0, grid, self.schedule) is not None:
                    need = reducer.needs
        sizes = t.size if reducer is not None and reducer.prop_attn and not t.unit else None
        bias = attention_bias(sizes, t.mask, t.x.dtype)
        rope = rope_for(embedded, i, t, moved)
        mid = step is not None and site == "mid"
        if not (need or mid or t.policy is not None or self.plugins):
            # Nobody listens: run the block as it is.
            extra: dict[str, Any] = {"rope": rope} if adapter.rope else {}
            if bias is not None:
                extra["attn_mask"] = bias.to(t.x.dtype) if not _autocast(t.x) else bias
            t = t._replace(x=block(t.x, **extra))
            seen = Signals()
        else:

            def run(attn: nn.Module, x: Tensor) -> tuple[Tensor, Signals]:
                return attend(
                    attn, x, prefix=t.prefix, rope=rope, bias=bias, policy=t.policy, need=need
                )

            x, seen = adapter.attn_half(block, t.x, run)
            t = t._replace(x=x)
            if mid:
                t = reducer.reduce(t, seen, step)  # type: ignore[union-attr, arg-type]
            t = t._replace(x=adapter.mlp_half(block, t.x))
        if step is not None and site == "post":
            t = reducer.reduce(t, seen, step)  # type: ignore[union-attr]
        return t, seen

    def _head(self, t: Tokens, memories: Sequence[Any]) -> Tensor:
        for plugin, memory in zip(self.plugins, memories, strict=True):
            logits = plugin.head(self.backbone, t, memory)
            if logits is not None:
                return logits
        return head(self.backbone, t._replace(x=self.backbone.norm(t.x)))

    # ------------------------------------------------------------------ timm's contract

    def unwrap(self) -> nn.Module:
        """The untouched timm model."""
        return self.backbone

    def verify(self, images: Tensor, tolerance: float = 0.0) -> float:
        """Compare the wrapper with nothing reduced against the backbone itself.

        Args:
            images: `(B, 3, H, W)`.
            tolerance: Largest difference that passes.

        Returns:
            The largest difference of the logits.

        Raises:
            ZooError: If it is above the tolerance.
        """
        was = self.training
        self.eval()
        try:
            with torch.no_grad():
                dense = ReducedViT(self.backbone)
                dense.eval()
                gap = (dense(images) - self.backbone(images)).abs().max().item()
        finally:
            self.train(was)
        if not gap <= tolerance:
            raise ZooError(f"expected a difference of at most {tolerance}, got {gap:.3g}")
        return gap

    @property
    def recipe(self) -> dict[str, Any]:
        """Everything but the weights: what has to be written down to build the model again."""
        cfg = getattr(self.backbone, "pretrained_cfg", None) or {}
        return {
            "backbone": {
                "name": cfg.get("architecture") or type(self.backbone).__name__,
                "tag": cfg.get("tag") or None,
                "num_classes": int(self.backbone.num_classes),
                "args": dict(self.backbone_args),
            },
            "reducer": None if self.reducer is None else self.reducer.config(),
            "schedule": None if self.schedule is None else self.schedule.config(),
            "plugins": [p.config() for p in self.plugins],
        }

    @property
    def default_cfg(self) -> dict[str, Any]:
        """timm's data and weight settings of the backbone."""
        return self.backbone.default_cfg

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """Same as `default_cfg`, under timm's newer name."""
        return self.backbone.pretrained_cfg

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return int(self.backbone.num_classes)

    @property
    def num_features(self) -> int:
        """Width of the features."""
        return int(self.backbone.num_features)

    def get_classifier(self) -> nn.Module:
        """The backbone's classifier."""
        return self.backbone.get_classifier()

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the backbone's classifier."""
        self.backbone.reset_classifier(num_classes, global_pool)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade time for memory in training."""
        self.backbone.set_grad_checkpointing(enable)

    def no_weight_decay(self) -> set[str]:
        """Parameter names that optimisers should not decay."""
        return {f"backbone.{name}" for name in self.backbone.no_weight_decay()}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's layer groups, for layer-wise learning rates."""
        return {key: _prefixed(value) for key, value in self.backbone.group_matcher(coarse).items()}


def _prefixed(pattern: Any) -> Any:
    if isinstance(pattern, str):
        return pattern.replace("^", r"^backbone\.", 1)
    return [(_prefixed(p[0]), *p[1:]) for p in pattern]


def _autocast(x: Tensor) -> bool:
    return torch.is_autocast_enabled(x.device.type)


def _checkpointed(function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        return checkpoint(function, *args, use_reentrant=False)

    return run
