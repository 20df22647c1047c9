"""The wrapper that runs a timm backbone block by block while a reducer changes its tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from reduction.assignment import unmerge
from reduction.base import AttentionInput, AttentionOutput, Outcome, Reducer, Spec, Step
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
from zoo.plan import Plan, make_plan
from zoo.plugins.base import Plugin


class Info(NamedTuple):
    """What happened to the tokens in one forward pass.

    Attributes:
        tokens: `(entering, leaving)` per block, prefix tokens included.
        size: Patches that each final token stands for, `(B, P+N)`.
        source: Final slot of each input patch `(B, N0)`, -1 where it was dropped. Slots count
            reducible tokens from 0.
        grid: Patch grid `(rows, columns)`.
        trace: State after each block, if asked for with `return_info="trace"`.
        final: State after the last block, before the final norm.
    """

    tokens: tuple[tuple[int, int], ...]
    size: Tensor
    source: Tensor
    grid: tuple[int, int]
    trace: tuple[Tokens, ...]
    final: Tokens


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
            plans = self.plan(strict=self.schedule.strict)
            reducer.setup(self._spec(plans))
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

    def _spec(self, plans: Sequence[Plan]) -> Spec:
        attn = self.backbone.blocks[0].attn
        return Spec(
            width=int(self.backbone.embed_dim),
            heads=int(attn.num_heads),
            head_dim=int(attn.head_dim),
            depth=self.depth,
            prefix=self.prefix,
            grid=self.grid,
            classes=int(self.backbone.num_classes),
            steps=tuple(p.step for p in plans),
        )

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
        return self._plan(grid, grid[0] * grid[1], schedule or self.schedule, strict)

    def _plan(
        self, grid: tuple[int, int], n: int, schedule: Schedule | None, strict: bool = False
    ) -> list[Plan]:
        return make_plan(
            self.reducer, schedule, list(self.plugins), self.depth, self.prefix, grid, n, strict
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
        follow = reducer is not None and (embedded.rope is not None or reducer.needs_origin)
        t = Tokens.start(embedded.x, self.prefix, track=track or follow)
        if not track:
            t = t._replace(source=None)
        memories = []
        for plugin in self.plugins:
            t, memory = plugin.start(t)
            memories.append(memory)
        if not isinstance(m.norm_pre, nn.Identity):
            t = t._replace(x=m.norm_pre(t.x))
        if reducer is not None:
            t = reducer.start(t)
        run: Callable[..., tuple[Tokens, Signals]] = self._block
        if getattr(m, "grad_checkpointing", False) and torch.is_grad_enabled():
            run = _checkpointed(self._block)
        counts, states = [], []
        signals = Signals()
        moved = len(self.plugins) > 0
        for i, plan in enumerate(self._plan(grid, n, self.schedule)):
            entering = t.x.shape[1]
            t, signals = run(i, t, signals, embedded, plan, moved)
            moved = moved or plan.step is not None
            for j, plugin in enumerate(self.plugins):
                t, memories[j] = plugin.after(i, t, memories[j])
            counts.append((entering, t.x.shape[1]))
            if trace:
                states.append(t)
        if reducer is not None:
            t = reducer.finish(t)
        source = t.source if t.source is not None else t.size.new_zeros(0)
        return t, Info(tuple(counts), t.size, source, grid, tuple(states), t), memories

    def _block(
        self,
        i: int,
        t: Tokens,
        signals: Signals,
        embedded: Embedded,
        plan: Plan,
        moved: bool,
    ) -> tuple[Tokens, Signals]:
        """One block with its reduction: the unit of gradient checkpointing."""
        block, reducer, step = self.backbone.blocks[i], self.reducer, plan.step
        adapter = block_adapter(block)
        site = None if reducer is None or step is None else reducer.site
        if site == "pre":
            t = reducer.reduce(t, signals, step)  # type: ignore[union-attr, arg-type]
            moved = True
        own = _own_attention(reducer, t, step)
        sizes = t.size if reducer is not None and reducer.prop_attn and not t.unit else None
        bias = attention_bias(sizes, t.mask, t.x.dtype)
        rope = rope_for(embedded, i, t, moved)
        quiet = own is None and t.policy is None and not self.plugins
        if quiet and not plan.need and site not in ("mid", "attn"):
            # Nobody listens: run the block as it is.
            extra: dict[str, Any] = {"rope": rope} if adapter.rope else {}
            if bias is not None:
                extra["attn_mask"] = bias if _autocast(t.x) else bias.to(t.x.dtype)
            t = t._replace(x=block(t.x, **extra))
            seen = Signals()
        else:
            listen = partial(
                attend,
                prefix=t.prefix,
                rope=rope,
                bias=bias,
                policy=t.policy,
                need=plan.need,
                own=own,
            )
            branch, result = adapter.attn_branch(block, t.x, listen)
            t = t if result.tokens is None else result.tokens
            t, seen = t._replace(x=t.x + branch), result.signals
            if site == "mid":
                t = reducer.reduce(t, seen, step)  # type: ignore[union-attr, arg-type]
            t = t._replace(x=adapter.mlp_half(block, t.x))
        if site == "post":
            t = reducer.reduce(t, seen, step)  # type: ignore[union-attr, arg-type]
        return t, seen

    def _head(self, t: Tokens, memories: Sequence[Any]) -> Tensor:
        for plugin, memory in zip(self.plugins, memories, strict=True):
            logits = plugin.head(self.backbone, t, memory)
            if logits is not None:
                return logits
        if self.reducer is not None:
            logits = self.reducer.logits(self.backbone, t)
            if logits is not None:
                return logits
        return head(self.backbone, t._replace(x=self.backbone.norm(t.x)))

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
        if self.reducer is None:
            return {}
        return self.reducer.auxiliary_losses(self.outcome(info, logits, targets, teacher))

    def outcome(
        self, info: Info, logits: Tensor, targets: Tensor, teacher: Outcome | None = None
    ) -> Outcome:
        """What losses may look at, with the final norm applied."""
        final = info.final._replace(x=self.backbone.norm(info.final.x))
        return Outcome(info.trace, final, logits, targets, teacher)

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


def _own_attention(
    reducer: Reducer | None, t: Tokens, step: Step | None
) -> Callable[[AttentionInput], AttentionOutput | None] | None:
    """The reducer's attention, if its class brings one."""
    if reducer is None or type(reducer).attend is Reducer.attend:
        return None
    return lambda given: reducer.attend(given, t, step)


def _autocast(x: Tensor) -> bool:
    return torch.is_autocast_enabled(x.device.type)


def _checkpointed(function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        return checkpoint(function, *args, use_reentrant=False)

    return run
